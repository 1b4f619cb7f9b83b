"""`python -m benchmarks.iwae --data path/to/mnist`: VAE and IWAE as in Burda et al. 2015, table 1.

Three models of their architecture (784-200-200-50, tanh, one stochastic layer, dynamic binarization): the VAE (k = 1),
and importance-weighted ones with k = 5 and 50. Each is trained for as many epochs, far fewer than the paper's 3,280,
and evaluated on all test images by -log p(x) with 5,000 samples. A run that is there already is not trained again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import aevb
from aevb.training.run_dir import METRICS

from .measure import RESULTS, describe

NUM_SAMPLES = 5000
# -log p(x), in nats, with one stochastic layer: Burda et al. 2015, table 1.
PUBLISHED = {1: 86.76, 5: 85.54, 50: 84.78}


def config(data: str, out: Path, k: int, epochs: int, threads: int | None) -> aevb.TrainConfig:
    return aevb.TrainConfig(
        data=data,
        out=str(out / f"k{k}"),
        epochs=epochs,
        hidden_dims=(200, 200),
        latent_dim=50,
        estimator="sgvb-b" if k == 1 else "iwae",
        num_samples=k,
        threads=threads,
    )


def trained(wanted: aevb.TrainConfig) -> tuple[aevb.Trainer, dict]:
    """The trainer with the run's model, and the last line of its metrics."""
    assert wanted.out is not None
    folder = Path(wanted.out)
    done = (folder / METRICS).read_text().splitlines() if (folder / METRICS).exists() else []
    if len(done) == wanted.epochs:
        trainer = aevb.Trainer.load(folder)
        if trainer.config != wanted:
            raise ValueError(f"{folder} holds a run with other options; choose another --out")
        return trainer, json.loads(done[-1])
    trainer = aevb.Trainer(wanted)
    return trainer, trainer.fit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with MNIST's four IDX files")
    parser.add_argument("--out", type=Path, default=Path("runs/iwae"))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--threads", type=int, help="threads to train with; part of a run's options")
    parser.add_argument("--results", type=Path, default=RESULTS / "iwae-mnist.json")
    args = parser.parse_args()

    rows = []
    for k in PUBLISHED:
        trainer, metrics = trained(config(str(Path(args.data).resolve()), args.out, k, args.epochs, args.threads))
        found = aevb.log_marginal_likelihood(trainer.model, trainer.test_x, NUM_SAMPLES, progress=True)
        rows.append(
            {
                "k": k,
                "test_elbo": round(metrics["test_elbo"], 2),
                "negative_log_likelihood": round(-found.mean, 3),
                "standard_error": round(found.mean_standard_error, 4),
                "effective_samples_median": round(float(found.effective_sample_size.median()), 1),
                "published": PUBLISHED[k],
                "above_published": round(-found.mean - PUBLISHED[k], 2),
                "training_seconds": round(metrics["seconds"]),
            }
        )
    order = [row["negative_log_likelihood"] for row in rows]
    report = {
        **describe(),
        "what": "784-200-200-50, tanh, dynamic binarization, Adam 1e-3, batch 100",
        "epochs": args.epochs,
        "num_samples": NUM_SAMPLES,
        "test_images": len(trainer.test_x),
        "published_order": order == sorted(order, reverse=True),
        "rows": rows,
    }
    args.results.write_text(json.dumps(report, indent=2) + "\n")
    print(f"| MNIST, {args.epochs} epochs | -log p(x), {NUM_SAMPLES:,} samples | Burda et al. 2015 | above it | ELBO |")
    print("|---|--:|--:|--:|--:|")
    for row in rows:
        name = "VAE" if row["k"] == 1 else f"IWAE, k = {row['k']}"
        print(
            f"| {name} | {row['negative_log_likelihood']:.2f} ± {row['standard_error']:.2f} | {row['published']:.2f} "
            f"| {row['above_published']:+.2f} | {row['test_elbo']:.2f} |"
        )


if __name__ == "__main__":
    main()
