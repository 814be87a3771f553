"""The mathematics of stage 1, one paper noun a file."""
