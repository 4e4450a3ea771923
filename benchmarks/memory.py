"""Peak memory, forecast against measurement: runs of six models by every method, before and after calibration.

Each run goes through the queue and the warm worker as the page's runs do, in a home of its own, and is short: memory is
decided by the first steps. Four of the models are made here with random weights. After them the error of the raw forecast
is told beside that of the corrected one, the correction of each run fitted on the others only (leave one run out).

Run: python -m benchmarks.memory [--steps 12] [--only stdlib-lm,digits-vit] [--home FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common
from engines.claim import LARGER

LLAMA = LARGER | dict(architectures=["LlamaForCausalLM"], model_type="llama", max_position_embeddings=512, hidden_act="silu", dtype="bfloat16")
QWEN = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=192, intermediate_size=512, num_hidden_layers=5,
            num_attention_heads=6, num_key_value_heads=2, vocab_size=32768, max_position_embeddings=256, tie_word_embeddings=True,
            hidden_act="silu", dtype="float32", use_sliding_window=False)
GPT2 = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", n_embd=320, n_layer=6, n_head=5, n_positions=256, vocab_size=8192,
            tie_word_embeddings=True, dtype="float32", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
BERT = dict(architectures=["BertModel"], model_type="bert", hidden_size=384, intermediate_size=1536, num_hidden_layers=6,
            num_attention_heads=12, vocab_size=8192, max_position_embeddings=256, type_vocab_size=2, dtype="float32",
            hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
MADE = {"llama-20m": LLAMA, "qwen-wide-vocabulary": QWEN, "gpt2-10m": GPT2, "bert-14m": BERT}
DATA = {"digits-vit": "digits", "bert-14m": "stdlib-modules"}
METHODS = ({"method": "full"}, {"method": "lora", "rank": 8}, {"method": "adalora"}, {"method": "magnitude", "sparsity": 0.5},
           {"method": "random", "sparsity": 0.5}, {"method": "wanda", "sparsity": 0.5, "samples": 32}, {"method": "structured"},
           {"method": "int8"}, {"method": "int4"}, {"method": "gptq", "samples": 32})
FURTHER = (
    ("stdlib-lm", [{"method": "wanda"}, {"method": "lora", "rank": 8}, {"method": "int8"}], {}),
    ("llama-20m", [{"method": "lora", "rank": 8}, {"method": "int8"}], {}),
    ("llama-20m", [{"method": "full"}], {"checkpointing": True}),
    ("llama-20m", [{"method": "full"}], {"precision": "fp32", "batch": 16, "accumulation": 4}),
    ("gpt2-10m", [{"method": "lora", "rank": 8}], {"batch": 32, "length": 128}),
    ("bert-14m", [{"method": "lora", "rank": 8}], {"precision": "fp32"}),
    ("digits-vit", [{"method": "full"}, {"method": "int4"}], {}),
)
"""Pipelines and training knobs beside the methods one by one."""
ITEMS = 96


def make(folder: Path, config: dict, seed: int = 0) -> Path:
    """A model folder with normal weights and a tokenizer trained on the bundled prose; written without torch."""
    import struct

    import numpy as np

    from engines import shapes
    from engines.profile import BYTES

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    draw, header, parts, at = np.random.default_rng(seed), {"__metadata__": {"format": "pt"}}, [], 0
    for t in shapes.tensors(config):
        if config["architectures"] == ["BertModel"] and t.name.startswith("classifier"):
            continue  # a body without a head, which is made when it is loaded for a task
        values = (draw.normal(0, 0.02, t.shape) if len(t.shape) > 1 else np.full(t.shape, float(t.name.endswith("weight")))).astype(np.float32)
        raw = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes() if t.dtype == "bfloat16" else values.tobytes()
        assert len(raw) == t.size * BYTES[t.dtype]
        header[t.name] = {"dtype": shapes.CODES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + len(raw)]}
        parts.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
    tokenizer(folder, config)
    return folder


def tokenizer(folder: Path, config: dict) -> None:
    """Byte-level BPE for a causal model, WordPiece with its special tokens for BERT; 8,192 entries at most."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    from engines import data

    texts = data.load("python-docs", task="causal-lm").train.texts
    if config["model_type"] == "bert":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=8192, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
        made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        facts = dict(tokenizer_class="BertTokenizer", pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=8192, special_tokens=["<|end|>"],
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        facts = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))


def cases(only: set[str], steps: int):
    """(model, spec without its model) of every run."""
    names = ["stdlib-lm", "digits-vit", *MADE]
    single = [(m, [method], {}) for m in names for method in METHODS]
    for model, pipeline, knobs in [*single, *FURTHER]:
        if not only or model in only:
            yield model, dict(data=DATA.get(model, "python-docs"), pipeline=pipeline, budget=dict(steps=steps * sum(
                p["method"] in ("full", "lora", "adalora") for p in pipeline) or steps), training=dict(items=ITEMS, evaluations=1, **knobs))


def execute(home, a) -> None:
    """Queue every run and wait for the last."""
    from workbench import dispatcher, machine, runs

    machine.calibrate(home.store)
    feeder = dispatcher.Dispatcher(home).start()
    try:
        folders = {name: make(home.path / "made" / name, config) for name, config in MADE.items() if not (home.path / "made" / name).exists()}
        rows = []
        for model, spec in cases({m for m in a.only.split(",") if m}, a.steps):
            given = dict(spec, model=str(folders[model]) if model in folders else model)
            began = time.monotonic()
            row = runs.start(given, home=home)
            while row["status"] in ("queued", "starting", "running"):
                time.sleep(0.1)
                row = home.store.light(row["id"])
            if row["status"] != "finished":
                print(f"  run {row['id']} {model} {spec['pipeline']} {row['status']}: {row['message']}", flush=True)
                continue
            full = home.store.run(row["id"])
            said, peak = full["forecast"]["memory"]["peak_bytes"], full["footprint"]["peak_bytes"]
            rows.append(said / peak)
            print(f"  {row['id']:3d}  {model:22s} {' + '.join(p['method'] for p in spec['pipeline']):22s} forecast {said / 1e6:7.0f} MB  measured "
                  f"{peak / 1e6:7.0f} MB  ratio {said / peak:5.2f}  {time.monotonic() - began:5.1f} s", flush=True)
    finally:
        feeder.stop()


def told(home) -> dict:
    """Each run with its raw forecast, its forecast as it was then, and corrected by all others; and the errors of each kind."""
    from workbench import calibration, calibration_report
    from workbench.shrinkage import median, quantile

    found = calibration_report.report(home.store, home)
    said = {r["id"]: r["forecast"]["memory"]["peak_bytes"] for r in home.store.runs(status="finished", limit=None, full=True)}
    rows = [dict(run=p["run"], model=p["model"], pipeline=" + ".join(p["methods"]), measured_mb=p["memory"]["measured"] / 1e6,
                 raw=p["memory"]["forecast"] / p["memory"]["measured"], then=said[p["run"]] / p["memory"]["measured"],
                 corrected=p["memory"]["corrected"] / p["memory"]["measured"], trainable_exact=p["trainable_exact"], size_exact=p["size_exact"])
            for p in reversed(found["points"])]
    observed, _ = calibration.observations(home.store, home)
    new_model = {}
    for name in {r["model"] for r in observed}:
        by = calibration.fitted([r for r in observed if r["model"] != name])
        new_model |= {r["run"]: calibration.corrected(r, by)[0] / r["peak"] for r in observed if r["model"] == name}

    def errors(ratios) -> dict:
        off = [abs(r - 1) for r in ratios]
        return dict(median=median(off), quantile90=quantile(off, 0.9), worst=max(off), within20=sum(e <= 0.2 for e in off) / len(off),
                    within30=sum(e <= 0.3 for e in off) / len(off))
    return dict(runs=len(rows), models=len({r["model"] for r in rows}), methods=len({m for p in found["points"] for m in p["methods"]}),
                before=errors([r["raw"] for r in rows]), after=errors([r["corrected"] for r in rows]), then=errors([r["then"] for r in rows]),
                new_model=errors(list(new_model.values())), by={k: found["by"][k] for k in ("model", "method")},
                trainable_exact=found["overall"]["trainable_exact"], size_exact=found["overall"]["size_exact"], left_out=found["left_out"], rows=rows)


def latency(rounds: int = 40) -> dict:
    """Milliseconds of a forecast for the shapes of a 70 B Llama (headers without values) in a warm process without torch."""
    code = ("import json, struct, sys, tempfile, time\n"
            "from pathlib import Path\n"
            "from engines import shapes\n"
            "config = json.loads(sys.argv[1])\n"
            "folder = Path(tempfile.mkdtemp())\n"
            "(folder / 'config.json').write_text(json.dumps(config))\n"
            "(folder / 'tokenizer.json').write_text('{}')\n"
            "header, at = {}, 0\n"
            "for t in shapes.tensors(config):\n"
            "    header[t.name] = dict(dtype='BF16', shape=list(t.shape), data_offsets=[at, at + 2 * t.size]); at += 2 * t.size\n"
            "text = json.dumps(header).encode()\n"
            "(folder / 'model.safetensors').write_bytes(struct.pack('<Q', len(text)) + text)\n"
            "from workbench import planner\n"
            "out = {}\n"
            "for name, more in (('fits', {}), ('does not fit', dict(memory_gb=100))):\n"
            "    times = []\n"
            f"    for i in range({rounds}):\n"
            "        spec = dict(model=str(folder), data='python-docs', budget=dict(minutes=1e6 + i, **more),\n"
            "                    pipeline=[dict(method='wanda'), dict(method='lora', rank='auto'), dict(method='int8')])\n"
            "        began = time.perf_counter(); planner.forecast(spec); times.append(1000 * (time.perf_counter() - began))\n"
            "    times = sorted(times[5:])\n"
            "    out[name] = dict(median=times[len(times) // 2], worst=times[-1])\n"
            "assert 'torch' not in sys.modules\n"
            "print(json.dumps(out))\n")
    config = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                  num_attention_heads=64, num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=8192,
                  tie_word_embeddings=False, dtype="bfloat16")
    done = subprocess.run([sys.executable, "-c", code, json.dumps(config)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the forecast printed nothing"])[-1])
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", default="", help="names of models, separated by commas")
    parser.add_argument("--home", help="a home to keep; with runs in it none is executed and it is only reported on")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["WORKBENCH_HOME"] = str(Path(a.home or temporary).resolve())
        from workbench.home import Home

        home = Home.open()
        if not home.store.count_runs(status="finished"):
            execute(home, a)
        found = dict(told(home), latency_70b_ms=latency())
    common.table("Peak memory, forecast / measured", found["rows"])
    common.table("Error of the peak", [dict(forecast=name, **found[key]) for name, key in (
        ("before calibration", "before"), ("corrected, this run left out", "after"), ("corrected, this model left out", "new_model"), ("as said when it began", "then"))])
    print(f"  {found['runs']} runs, {found['models']} models, {found['methods']} methods; trainable exact {found['trainable_exact']}, size exact "
          f"{found['size_exact']}; forecast of a 70 B shape: {found['latency_70b_ms']}")
    common.write("memory", found)


if __name__ == "__main__":
    main()
