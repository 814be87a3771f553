"""The paper's figures and more, one family a file; tables/make_figures.py draws them."""
