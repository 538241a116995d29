"""Builds a model's runner: in the fastest way that is found to compute what the model does."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace

import torch

from worker.engine.bucketed import BucketOptions
from worker.engine.budget import bound
from worker.engine.loader import LoadedModel, LoadError
from worker.engine.memory import lacks_memory
from worker.engine.messages import Limits
from worker.engine.model_runner import ModelRunner, UnsupportedModelError

log = logging.getLogger("unbroken.engine")

SHARES = (1.0, 0.8, 0.64)  # of the cache's size, one after the other where memory is short


def build_runner(
    loaded: LoadedModel, max_batch_size: int, limits: Limits
) -> tuple[ModelRunner, LoadedModel]:
    """Build a runner that has its memory; return it, and the model as it is run.

    That is with the context there is room for, and, where continuation is exact, with what rounding
    depends on in its fingerprint. Where bucketed steps fail, or compute something else than the
    model's own forward, plain ones are taken.

    Raises:
        LoadError: the model cannot be batched, or there is no memory for its cache.
    """
    if loaded.model.device.type == "cuda":
        # Streams and events that nobody gives a device belong to the current one.
        torch.cuda.set_device(loaded.model.device)
    for options in _choices(loaded.bucketed):
        for share in SHARES:
            try:
                built = _build(loaded, max_batch_size, limits, options, share)
            except (torch.AcceleratorError, LoadError):
                raise
            except Exception as error:
                short = any(lacks_memory(e) for e in (error, error.__cause__) if e is not None)
                log.warning("decode steps %s fail; trying others", options, exc_info=True)
            else:
                log.info("decode steps are %s by %s", options, built[0].attention)
                return built
            gc.collect()  # the cache of what has failed, so that the next one finds the memory
            torch.cuda.empty_cache()  # without CUDA it does nothing
            if not short:
                break
    try:
        return _build(loaded, max_batch_size, limits, None)
    except UnsupportedModelError as error:
        log.exception("the model cannot be batched")
        raise LoadError(f"'{loaded.name}' cannot be served: {error}.") from error


def _choices(options: BucketOptions | None) -> list[BucketOptions]:
    """List what to try before plain steps.

    That is the same without a compiler, which may be missing, and without recording.
    """
    if options is None:
        return []
    found = [options]
    if options.compile:
        found.append(replace(options, compile=False))
    if options.capture:
        found.append(replace(options, capture=False))
    return found


def _build(
    loaded: LoadedModel,
    max_batch_size: int,
    limits: Limits,
    options: BucketOptions | None,
    share: float = 1.0,
) -> tuple[ModelRunner, LoadedModel]:
    runner = ModelRunner(
        loaded.model,
        max_batch_size,
        loaded.context_length,
        replay=loaded.replay,
        bucketed=options,
    )
    runner.verify()
    context = bound(runner.cache, limits, loaded, share)
    runner.warm_up()
    fingerprint = loaded.fingerprint
    if loaded.exact and runner.bucketed is not None:
        fingerprint += f" | {runner.bucketed.rounding}"
    return runner, replace(loaded, context_length=context, fingerprint=fingerprint)
