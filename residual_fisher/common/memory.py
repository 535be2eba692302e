"""Running out of memory, by all the names that PyTorch has for it."""

# cuBLAS and cuSOLVER allocate for themselves, when they are first used too, and fail with errors of their own.
PHRASES = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "`cublasCreate", "`cusolverDnCreate")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, of Python or of PyTorch on any device, says that memory has run out."""
    if isinstance(error, MemoryError):
        return True
    # torch.OutOfMemoryError is a RuntimeError, with or without words
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, RuntimeError) and (named or any(phrase in str(error) for phrase in PHRASES))
