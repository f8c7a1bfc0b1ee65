"""A made-up run directory in the layout that `rmd run` leaves, with DPO degenerating in it."""

import json
import zlib
from pathlib import Path

import numpy as np

OBJECTIVES = ("dpo", "ipo", "distill", "pessimistic_dpo", "pessimistic_distill", "ensemble")
MEMBERS = 4
HOSTILE = (
  "<script>alert('x')</script><img src=x onerror=alert(1)> \x00\x07 \ud800 العربية 日本語 🙂 "
  '\u202eevil\u202c </pre></details><style>*{display:none}</style> &amp; "quoted"'
)
WORDS = [
  "ferry",
  "bridge",
  "opens",
  "closed",
  "monday",
  "rain",
  "flood",
  "repair",
  "council",
  "vote",
  "harbour",
  "delay",
  "ticket",
]

# per objective: mean advantage, final chosen and rejected log-ratio, margin scale, length change
_STORY = {
  "dpo": (0.25, -14.0, -31.0, 3.2, -3.0),
  "ipo": (0.10, -5.0, -11.0, 1.6, -2.0),
  "distill": (0.55, 1.1, -4.5, 1.0, 0.5),
  "pessimistic_dpo": (0.38, -1.0, -9.0, 1.5, -1.0),
  "pessimistic_distill": (0.60, 1.9, -3.2, 0.9, 1.0),
  "ensemble": (0.85, 1.4, -3.9, 0.95, 3.0),
}


def write_run(
  root: Path, *, seeds: int = 2, objectives=OBJECTIVES, steps: int = 200, pairs: int = 300
) -> Path:
  """Writes a whole run directory and returns it."""
  root.mkdir(parents=True, exist_ok=True)
  (root / "config.gin").write_text(
    "# gin/runs/fake.gin\nBETA = 0.1\nRun.seeds = [0, 1]\nRun.objectives = "
    f"{list(objectives)!r}\nSplits.test = 0.1  # <not a tag>\n"
  )
  stages = []
  for seed in range(seeds):
    _write_seed(root / f"seed_{seed}", seed, objectives, steps, pairs)
    names = ["data", "sft", "reward", "scores"]
    names += [f"{kind}/{name}" for kind in ("align", "evaluate") for name in objectives]
    for index, name in enumerate(names):
      key = f"{zlib.crc32(f'{name}{seed}'.encode()) * 0x9E3779B9:016x}"[:16]
      record = {"name": name, "seed": seed, "key": key, "seconds": 3.7 + 2 * index}
      stages.append(record | {"skipped": index == 1})
  write_json(
    root / "run.json",
    {
      "stages": stages,
      "versions": {"python": "3.11.2", "jax": "0.10.2", "numpy": "2.4.6"},
      "compiled": {"programs": 12, "seconds": 41.3},
      "command": "rmd run --gin_file=gin/runs/bias.gin --gin.BETA=0.1",
    },
  )
  return root


def write_json(path: Path, value: object) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def write_lines(path: Path, records: list[dict]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _write_seed(folder: Path, seed: int, objectives, steps: int, pairs: int) -> None:
  generator = np.random.default_rng(seed)
  lengths = generator.integers(8, 40, (pairs, 2))
  reward = generator.normal(1.2, 2.2, (1 + MEMBERS, pairs)) * 0.5 + generator.normal(
    0.6, 1.6, pairs
  )
  _write_data(folder, lengths, pairs)
  for stage, low in (("sft", 1.1), ("reward", 0.45)):
    write_lines(folder / stage / "metrics.jsonl", _curves(generator, stage, low, steps))
  for name in objectives:
    if name in _STORY:
      _write_objective(folder, name, seed, generator, steps, lengths, reward)
  _write_reward(folder, generator)


def _curves(generator, stage: str, low: float, steps: int) -> list[dict]:
  records = []
  for step in range(1, steps + 1):
    loss = low + np.exp(-step / (0.2 * steps)) + 0.05 * generator.normal()
    record = {"step": step, "time": 1.7e9 + step, "loss/total": loss, "perf/tokens_per_second": 9e4}
    if stage == "reward":
      record |= {f"loss/member_{k}": loss + 0.03 * k for k in range(1 + MEMBERS)}
    records.append(record)
    if step % (steps // 8) == 0:
      evaluation = {"step": step, "time": 1.7e9 + step, "eval/loss": loss + 0.08}
      if stage == "reward":
        evaluation |= {
          f"eval/accuracy/member_{k}": 0.9 - 0.4 * np.exp(-step / 40) for k in range(5)
        }
      records.append(evaluation)
  return records


def _write_data(folder: Path, lengths: np.ndarray, pairs: int) -> None:
  histograms = {}
  for name, values in (
    ("prompt", lengths.sum(1)),
    ("chosen", lengths[:, 0]),
    ("rejected", lengths[:, 1]),
  ):
    counts, edges = np.histogram(values, bins=16)
    histograms[name] = {"edges": edges.tolist(), "counts": counts.tolist()}
  write_json(
    folder / "data" / "summary.json",
    {
      "splits": {"train": 4000, "validation": 400, "test": pairs, "demonstrations": 2000},
      "left_out": ["pairs.jsonl:87: chosen: empty response, write one or drop the pair"],
      "lengths": histograms,
      "longer_wins": 0.21,
      "vocabulary": {"size": 160, "fingerprint": "3f2a91"},
    },
  )


def _write_objective(folder, name, seed, generator, steps, lengths, reward) -> None:
  advantage, chosen, rejected, scale, length = _STORY[name]
  pairs = lengths.shape[0]
  records = []
  for step in range(1, steps + 1):
    done = 1 - np.exp(-3 * step / steps)
    pull = done * (1 + (0.4 * step / steps if name == "dpo" else 0))
    metrics = {
      "loss/total": 0.7 - 0.3 * done + 0.05 * generator.normal(),
      "logp/chosen_minus_ref": chosen * pull + 0.5 * generator.normal(),
      "logp/rejected_minus_ref": rejected * pull + 0.7 * generator.normal(),
      "margin/implicit_mean": 1.5 * scale * pull,
      "margin/implicit_p95": 4.2 * scale * pull + 0.2 * generator.normal(),
      "margin/accuracy": 0.5 + (0.3 - 0.02 * OBJECTIVES.index(name)) * done,
      "kl/forward_pairs": -(chosen + rejected) / 2 * pull,
      "ensemble/disagreement": 1.2 + 0.1 * generator.normal(),
    }
    if name == "ensemble":
      picked = generator.integers(MEMBERS) if step < steps / 2 else (step // 9) % 2
      metrics |= {f"select/member_{1 + k}": float(k == picked) for k in range(MEMBERS)}
      metrics |= {f"ensemble/distance_{1 + k}": 2 + k / 2 - done for k in range(MEMBERS)}
    records.append({"step": step, "time": 1.7e9 + step} | metrics)
    if step % (steps // 8) == 0:
      evaluated = {f"eval/{key}": value for key, value in metrics.items()}
      evaluated["eval/loss"] = metrics["loss/total"]
      records.append({"step": step, "time": 1.7e9 + step} | evaluated)
  write_lines(folder / "align" / name / "metrics.jsonl", records)

  place = folder / "evaluate" / name
  place.mkdir(parents=True)
  noise = 0.3 if "distill" in name or name == "ensemble" else 1.6
  implicit = scale * (reward[0] + noise * generator.normal(size=pairs))
  np.savez(
    place / "margins.npz",
    implicit=implicit,
    reward=reward,
    length_difference=lengths[:, 0] - lengths[:, 1],
    chosen_log_ratio=chosen + 2 * generator.normal(size=pairs),
    rejected_log_ratio=rejected + 3 * generator.normal(size=pairs),
  )
  shared = np.random.default_rng(100 + seed)  # the same reference under every objective
  reference = shared.normal(2.0, 1.0, 60)
  gain = advantage + 0.05 * seed + shared.normal(0, 0.6, 60) + 0.3 * generator.normal(size=60)
  samples = []
  shape = (60, 4)
  spread = np.random.default_rng(300 + seed).normal(0, 0.4, shape)
  np.savez(
    place / "scores.npz",
    policy=(reference + gain)[:, None] + spread + 0.2 * generator.normal(size=shape),
    reference=reference[:, None] + spread,
    policy_length=np.random.default_rng(200 + seed).poisson(18 + length, shape),
    reference_length=np.random.default_rng(200 + seed).poisson(18, shape),
  )
  for i in range(12):
    reference_length = int(shared.integers(12, 24))
    text = " ".join(generator.choice(WORDS, max(3, int(reference_length + length))))
    samples.append(
      {
        "prompt": HOSTILE if i == 1 else f"facts {i} : " + " ".join(shared.choice(WORDS, 9)),
        "policy": "long " * 2000 if i == 2 else (HOSTILE if i == 1 else text),
        "reference": " ".join(shared.choice(WORDS, reference_length)),
        "chosen": " ".join(shared.choice(WORDS, 12)),
        "reward_policy": float(reference[i] + gain[i]),
        "reward_reference": float(reference[i]),
        "length_policy": len(text.split()),
        "length_reference": reference_length,
      }
    )
  write_lines(place / "samples.jsonl", samples)
  half = 0.16
  won = 0.5 + advantage / 3
  write_json(
    place / "evaluation.json",
    {
      "objective": name,
      "seed": seed,
      "beta": 0.1,
      "judge": "oracle",
      "advantage": {
        "mean": float(gain.mean()),
        "low": float(gain.mean()) - half,
        "high": float(gain.mean()) + half,
        "n": 60,
      },
      "win_rate": {"mean": won, "low": won - 0.06, "high": won + 0.06},
      "win_rate_length_controlled": {
        "mean": won - length / 60,
        "low": won - length / 60 - 0.08,
        "high": won - length / 60 + 0.08,
        "extrapolates": name == "dpo",
      },
      "finished_policy": 0.98,
      "reward_policy": 2.0 + float(gain.mean()),
      "reward_reference": 2.0,
      "length_policy": 18.0 + length,
      "length_reference": 18.0,
      "implicit_accuracy": 0.71,
      "kl_forward": {"mean": abs(chosen) + 1, "low": abs(chosen) + 0.6, "high": abs(chosen) + 1.4},
      "kl_reverse": {"mean": abs(chosen) / 2 + 1, "low": abs(chosen) / 2, "high": 3 + abs(chosen)},
      "margin_correlation": float(np.corrcoef(implicit, reward[0])[0, 1]),
      "diagnostics": {"logp/chosen_minus_ref": chosen, "margin/implicit_p95": 4.2 * scale},
    },
  )


def _write_reward(folder: Path, generator) -> None:
  members = []
  for k in range(1 + MEMBERS):
    confidence = np.linspace(0.53, 0.97, 8)
    accuracy = np.clip(confidence - 0.03 * k + 0.02 * generator.normal(size=8), 0, 1)
    members.append(
      {
        "name": "all data" if k == 0 else f"member_{k}",
        "accuracy": 0.82 - 0.02 * k,
        "nll": 0.42 + 0.02 * k,
        "ece": 0.02 + 0.015 * k,
        "reliability": [
          {"confidence": c, "accuracy": a, "count": 40}
          for c, a in zip(confidence, accuracy, strict=True)
        ],
        "by_length": [
          {"low": 8.0 * b - 20, "high": 8.0 * b - 13, "accuracy": 0.9 - 0.06 * b, "count": 60}
          for b in range(5)
        ],
      }
    )
  table = 0.75 + 0.1 * generator.random((5, 5))
  table = (table + table.T) / 2
  np.fill_diagonal(table, 1.0)
  write_json(
    folder / "evaluate" / "reward.json",
    {"members": members, "agreement": table.tolist(), "disagreement_mean": 1.3, "pairs": 300},
  )
