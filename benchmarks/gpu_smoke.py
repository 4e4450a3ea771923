"""One command that drives the whole GPU path and prints what it saw: CUDA, NVML, bf16, int8, 2:4.

On a machine without a GPU it says so and ends with exit code 0. It downloads nothing.

Run: python -m benchmarks.gpu_smoke
"""

from __future__ import annotations

import statistics
import time

from benchmarks import common


def timed(call, rounds: int = 20) -> float:
    """Median milliseconds of ``call`` on the GPU."""
    import torch
    times = []
    for i in range(rounds + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def nvml() -> list[dict]:
    """What the driver's counters say; one row a figure, a refusal is a row too."""
    import pynvml
    rows = []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as e:
        return [dict(figure="NVML", value=f"no answer: {e}")]
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    for name, read in (("name", lambda: pynvml.nvmlDeviceGetName(handle)), ("driver", pynvml.nvmlSystemGetDriverVersion),
                       ("memory used MB", lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / 1e6),
                       ("utilisation %", lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
                       ("power W", lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000),
                       ("temperature C", lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
                       ("SM clock MHz", lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
                       ("energy kJ since boot", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e6)):
        try:
            rows.append(dict(figure=name, value=read()))
        except pynvml.NVMLError as e:
            rows.append(dict(figure=name, value=f"refused: {e}"))
    return rows


def products() -> list[dict]:
    """Matrix products of 4096 rows in the formats that have a kernel, against bf16."""
    import torch
    rows, n = [], 4096
    x, w = torch.randn(n, n, device="cuda", dtype=torch.bfloat16), torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    base = timed(lambda: x @ w.t())

    def row(name, call):
        try:
            ms = timed(call())
            rows.append(dict(product=name, ms=ms, against_bf16=base / ms))
        except (RuntimeError, NotImplementedError) as e:
            rows.append(dict(product=name, ms=float("nan"), against_bf16=str(e).splitlines()[0][:60]))

    rows.append(dict(product="bf16", ms=base, against_bf16=1.0))
    row("fp32", lambda: (lambda a, b: lambda: a @ b.t())(x.float(), w.float()))

    def int8():
        a, b = (t.float().mul(20).clamp(-127, 127).to(torch.int8) for t in (x, w))
        return lambda: torch._int_mm(a, b.t())

    def sparse():
        # Two of every four zero: the pattern that the hardware skips.
        keep = w.view(n, n // 4, 4).abs().argsort(dim=-1).argsort(dim=-1) >= 2
        s = torch.sparse.to_sparse_semi_structured((w.view(n, n // 4, 4) * keep).view(n, n))
        return lambda: torch.nn.functional.linear(x, s)

    row("int8 x int8", int8)
    row("2:4 bf16", sparse)
    return rows


def training() -> list[dict]:
    """A few steps of the training loop on the GPU in bf16, with torch's allocator figures."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from engines.training.loss import task_loss
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
                                         num_key_value_heads=12, max_position_embeddings=512, tie_word_embeddings=True)).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, 8192, (16, 513), device="cuda")
    losses = []

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = task_loss(model, dict(input_ids=tokens[:, :-1], labels=tokens[:, 1:].contiguous()), "causal-lm")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    ms = timed(step, rounds=10)
    return [dict(figure="training step ms (16 x 512 tokens)", value=ms), dict(figure="tokens/s", value=16 * 512 / ms * 1000),
            dict(figure="loss first", value=float(losses[0])), dict(figure="loss last", value=float(losses[-1])),
            dict(figure="allocated peak MB", value=torch.cuda.max_memory_allocated() / 1e6),
            dict(figure="reserved MB", value=torch.cuda.memory_reserved() / 1e6)]


def main() -> None:
    import torch
    counters = nvml()
    common.table("NVML", counters)
    if not torch.cuda.is_available():
        print(f"  No CUDA device: torch {torch.__version__} sees none. Nothing else can be driven here.")
        return
    print(f"\n  torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name(0)}, capability {torch.cuda.get_device_capability(0)}")
    kernels, steps = products(), training()
    common.table("Matrix products, 4096 x 4096 x 4096", kernels)
    common.table("Training", steps)
    common.write("gpu_smoke", dict(nvml=counters, products=kernels, training=steps))


if __name__ == "__main__":
    main()
