"""What a checkpoint needs of memory to be served, and what there is of it.

An estimate before anything starts, so that a model that cannot fit is refused in words at once
instead of minutes later by the system. No server is started here.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

from pipelines.engines.options import VllmOptions
from pipelines.errors import PolicyUnavailableError
from pipelines.weights import tensors

GIB = 1 << 30
RUNTIME_GIB = 1.0  # of vLLM's own processes on a CPU: 0.9 to 1.1 were seen
ACTIVATIONS = 1.05  # of the weights, for what is computed from them
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SAFETENSORS_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def on_gpu(options: VllmOptions) -> bool:
    """Whether the server will use a GPU."""
    if options.device == "auto":
        return bool(_gpus())
    return options.device == "cuda"


def require(folder: Path, options: VllmOptions) -> str:
    """Need and have in words; a checkpoint that does not fit into memory is refused.

    Raises:
        PolicyUnavailableError: need and have are in the message.
    """
    said, need, have = account(folder, options)
    if need > have:
        msg = f"{folder}: the model does not fit into memory: {said}"
        raise PolicyUnavailableError(msg)
    return said


def account(folder: Path, options: VllmOptions) -> tuple[str, float, float]:
    """Need and have in words, and both in GiB; a machine that does not tell has all it wants."""
    weights = weight_bytes(folder, options.dtype) * ACTIVATIONS / GIB
    if on_gpu(options):
        free = _gpus()[: options.tensor_parallel]
        need = weights / options.tensor_parallel
        have = min(free, default=math.inf) * options.gpu_memory
        parts = f"weights {weights:.1f} GiB over {options.tensor_parallel} GPU(s)"
        remedy = "raise tensor_parallel, or take a larger GPU or a smaller dtype"
    else:
        need = weights + options.kv_cache_gib + RUNTIME_GIB
        have = available()
        parts = (
            f"weights {weights:.1f} GiB, keys and values {options.kv_cache_gib} GiB, vLLM "
            f"itself {RUNTIME_GIB:.1f} GiB"
        )
        remedy = "lower kv_cache_gib, take a smaller dtype, or a machine with more memory"
    return f"need {need:.1f} GiB ({parts}), have {have:.1f} GiB; {remedy}", need, have


def weight_bytes(folder: Path, dtype: str = "auto") -> int:
    """Bytes of a checkpoint's weights in memory, when held as `dtype` (auto: as vLLM would)."""
    held = BYTES.get(dtype) or _automatic(folder)
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return sum(_safetensors(path, held) for path in shards)
    return sum(p.stat().st_size for pattern in ("*.bin", "*.gguf") for p in folder.glob(pattern))


def available() -> float:
    """GiB of main memory that can be had now: the machine's, or the control group's limit."""
    found = [math.inf]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int((group / "memory.current").read_text(encoding="ascii"))
            found.append((int(limit) - used) / GIB)
    except (OSError, ValueError):
        pass  # another system, or no control group: the rest decides
    return min(found)


def _automatic(folder: Path) -> int:
    """Bytes a weight takes under vLLM's `auto`: that of the checkpoint, 32-bit ones halved."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 2
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return 1 if "8" in named else 2


def _safetensors(path: Path, held: int) -> int:
    """Bytes of a file's tensors once loaded; weights of 8 bits or fewer stay as they are."""
    try:
        total = 0
        for tensor in tensors(path).values():
            stored = SAFETENSORS_BYTES.get(tensor["dtype"])
            start, end = tensor["data_offsets"]
            total += end - start if stored is None else (end - start) // stored * held
        return total
    except (OSError, ValueError, KeyError):
        return path.stat().st_size


def _gpus() -> list[float]:
    """Free memory of each GPU, GiB; none where nvidia-smi is missing or finds none."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return [float(line) / 1024 for line in said.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
