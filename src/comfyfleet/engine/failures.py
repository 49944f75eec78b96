"""What a node's exception is called and what its inputs looked like, in ComfyUI's words; tensors never as numbers."""

from __future__ import annotations

from typing import Any

MAX_SHOWN_INPUT = 2000  # characters of one input's text in an error
OUT_OF_MEMORY = "torch.OutOfMemoryError"


def describe_error(error: Exception) -> tuple[str, str]:
    """(dotted type, message) as ComfyUI tells them; every way of running out of memory has one type."""
    kind = type(error).__qualname__
    module = type(error).__module__
    message = f"{error}\n"
    is_refused_allocation = "allocate memory" in str(error) or "not enough memory" in str(error)
    if kind in ("OutOfMemoryError", "MemoryError") or (isinstance(error, RuntimeError) and is_refused_allocation):
        hint = "This needed more memory than there is: a smaller size, fewer frames or a smaller batch needs less.\n"
        return OUT_OF_MEMORY, f"{message}\n{hint}"
    return (kind if module == "builtins" else f"{module}.{kind}"), message


def shown_value(value: Any) -> Any:
    """An input as an error shows it: short, and never a tensor's numbers."""
    if isinstance(value, int | float | bool) or value is None:
        return value
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype}"
    if isinstance(value, str):
        return value[:MAX_SHOWN_INPUT]
    return type(value).__name__
