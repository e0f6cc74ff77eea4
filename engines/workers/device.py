"""Where a model computes: on the device that its launch names, else on the first GPU, else on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.workers.server import Refused


def torch_device(options: Mapping[str, Any]) -> str:
    """torch's name of it; sets the threads that a launch says, too.

    Options: `device`, where nothing and `auto` leave the choice, and `n_threads`. Raises Refused if it is not there.
    """
    import torch

    if threads := options.get("n_threads"):
        torch.set_num_threads(int(threads))
    wanted = str(options.get("device") or "auto")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise Refused(
            f"The launch says device {wanted!r}, but torch {torch.__version__} sees no GPU here. Leave `device` out, "
            "or install a torch that fits the driver."
        )
    return wanted


def onnx_session(file: str, options: Mapping[str, Any]) -> Any:
    """A model of onnxruntime there, with so many threads.

    Options: `device` (cpu or cuda) and `n_threads`. Raises Refused if the device is not there, or the file damaged.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    if n_threads := options.get("n_threads"):
        settings.intra_op_num_threads = n_threads
    providers = ["CPUExecutionProvider"]
    if options.get("device") == "cuda":
        providers.insert(0, "CUDAExecutionProvider")
    if providers[0] not in onnxruntime.get_available_providers():  # it would take the CPU and say nothing
        raise Refused(
            "The launch says device 'cuda', which this onnxruntime does not know. Leave `device` out, or install "
            "onnxruntime-gpu in place of onnxruntime into the engine's environment."
        )
    try:
        session = onnxruntime.InferenceSession(file, sess_options=settings, providers=providers)
    except Exception as exc:  # its errors have no base class but this
        raise Refused(f"{file} cannot be loaded, the file may be damaged: {exc}") from exc
    if providers[0] not in session.get_providers():
        raise Refused("The launch says device 'cuda', and onnxruntime cannot use the GPU here: its log says why.")
    return session


def without_native_torchaudio() -> None:
    """Lets torchaudio be imported whose compiled half does not fit torch; call it before anything imports it.

    Its wheels on the package index are built for CUDA, and fail beside a torch for processors. What models of speech
    take of it (filters, spectrograms) is Python.
    """
    import sys
    from types import ModuleType

    try:
        import torchaudio  # noqa: F401
    except ImportError:
        return  # it is not there
    except OSError:
        stand_in = ModuleType("torchaudio._extension")
        stand_in.__dict__.update(
            _IS_TORCHAUDIO_EXT_AVAILABLE=False, _IS_ALIGN_AVAILABLE=False, fail_if_no_align=lambda function: function
        )
        sys.modules["torchaudio._extension"] = stand_in
