"""From graph to instruction data on the bundled graph, through the stages' own commands: `python demo_complete.py`.

Trains, dumps the codes, ranks from the dumped integers alone, shuffles them and ranks again (the control), and turns
the codes into instruction data. Each step prints its command, which does the same alone.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

from run_record import ROOT, CommandParser, InputError, read_json, run_command

SHAPE = ["--seq_len", "4", "--num_code", "256", "--num_quantizers", "4"]  # L, K, Q
STEM = "family_4_256_4_rq"


def steps(out: Path, epochs: int) -> list[tuple[str, list[str]]]:
    """(what the step does, its command) in order; every file goes below ``out``."""
    codes, checkpoint = out / f"{STEM}.pt", out / "checkpoints" / f"{STEM}.pt"
    from_codes = ["run_rq.py", "--dataset", "data/family", "--eval_codes", str(codes), "--checkpoint", str(checkpoint)]
    return [
        ("train RQGCN on the family graph, dump its codes and score the dump",
         ["run_rq.py", "--dataset", "data/family", *SHAPE, "--decoder", "distmult", "--epoch", str(epochs),
          "--lr", "0.005", "--batch", "256", "--encoder_every", "2", "--eval_every", "5", "--out_dir", str(out),
          "--checkpoint_dir", str(checkpoint.parent), "--overwrite"]),
        ("rank the test split from the dumped integers alone: no graph, no encoder",
         [*from_codes, "--metrics_out", str(out / "from_codes.json")]),
        ("the control: give every entity the codes of another one and rank again",
         [*from_codes, "--shuffle_codes", "--metrics_out", str(out / "shuffled.json")]),
        ("ask a question of the codes", [*from_codes, "--predict", "ada_ashley", "mother", "--top", "3"]),
        ("turn the codes into instruction data (triple classification)",
         ["Class/gen_fb_data_rq.py", "--codes", str(codes), "--dataset", "data/family",
          "--out_dir", str(out / "lora_data")]),
        ("look for leaks in it", ["Class/check_leaks.py", str(out / "lora_data")]),
    ]  # fmt: skip


def main() -> int:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out_dir", type=Path, default=Path("demo_output"), help="folder for everything the demo writes"
    )
    parser.add_argument("--quick", action="store_true", help="fewer epochs: half a minute in place of two")
    args = parser.parse_args()
    out = args.out_dir.resolve()
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out  # the steps run in the repository
    plan = steps(out, 12 if args.quick else 40)
    start = time.monotonic()
    for number, (title, command) in enumerate(plan, start=1):
        print(f"\n[{number}/{len(plan)}] {title}\n$ python {shlex.join(command)}", flush=True)
        code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
        if code:
            raise InputError(f"step {number} ended with exit code {code}; run its command alone to see why")

    out = ROOT / out
    record = read_json(out / f"{STEM}.json", "record")
    rows = {
        "recorded when the codes were dumped": record["test"],
        "from the dumped integers alone": read_json(out / "from_codes.json", "metrics"),
        "from shuffled codes (control)": read_json(out / "shuffled.json", "metrics"),
    }
    print(f"\n{'test, filtered':38s}   MRR   H@1   H@10")
    for label, metrics in rows.items():
        print(f"{label:38s} {metrics['mrr']:.3f} {metrics['hits@1']:.3f}  {metrics['hits@10']:.3f}")
    recorded, again, shuffled = (metrics["mrr"] for metrics in rows.values())
    if abs(recorded - again) > 1e-6 or shuffled > 0.1 * recorded:
        print("error: the dumped integers do not carry the recorded score", file=sys.stderr)
        return 1
    print(f"the integers alone carry the graph ({time.monotonic() - start:.0f} s); everything is in {args.out_dir}")
    print("next: python data/download.py FB15k-237 && python run_rq.py --dataset data/FB15k-237 --max_minutes 60")
    return 0


if __name__ == "__main__":
    run_command(main)
