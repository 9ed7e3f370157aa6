"""The one place that reaches into transformers' loader, which is private: everything else uses its public interface.

``PreTrainedModel._load_pretrained_model`` is called when the model stands on the meta device and the checkpoint's key
mapping is final. Two things are done there: a packer stops the loading and keeps the empty model with its mapping
(`capture_skeleton`), and a loader hands in the tensors of a pack instead of a checkpoint's (`build_model`).
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers.modeling_utils
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.models.auto import modeling_auto

from moe_offload.errors import UnsupportedModelError

LoadFunction = Callable[[Any, Any, Callable[..., Any]], Any]
_patch_lock = threading.Lock()


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device and how a checkpoint's keys map to it."""

    model: Any
    renamings: Sequence[WeightRenaming]
    converters: Sequence[WeightConverter]


class _CapturedError(Exception):
    """Carries the skeleton out of transformers' loader."""

    def __init__(self, skeleton: Skeleton) -> None:
        super().__init__("captured")
        self.skeleton = skeleton


def auto_class(config: PreTrainedConfig) -> Any:
    """The transformers auto class that builds ``config``'s language model; `UnsupportedModelError` if there is none."""
    if type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder:
        return AutoModelForCausalLM
    if type(config) in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    if type(config) in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise UnsupportedModelError(f"transformers has no text-generating model for {type(config).__name__}")


@contextlib.contextmanager
def _intercepted(load: LoadFunction) -> Iterator[None]:
    """Replace the loader by ``load(model, load_config, original)``; no checkpoint file is looked for."""
    pretrained = transformers.modeling_utils.PreTrainedModel
    with _patch_lock:
        original_load = pretrained._load_pretrained_model
        original_files = transformers.modeling_utils._get_resolved_checkpoint_files

        def load_pretrained_model(model: Any, state_dict: Any, files: Any, load_config: Any, *rest: Any) -> Any:
            return load(model, load_config, original_load)

        pretrained._load_pretrained_model = staticmethod(load_pretrained_model)
        transformers.modeling_utils._get_resolved_checkpoint_files = lambda *args, **kwargs: ([], None)
        try:
            yield
        finally:
            pretrained._load_pretrained_model = staticmethod(original_load)
            transformers.modeling_utils._get_resolved_checkpoint_files = original_files


def capture_skeleton(folder: str, config: PreTrainedConfig, dtype: torch.dtype) -> Skeleton:
    """The model of ``config``, empty, with the mapping that transformers would load a checkpoint by."""

    def capture(model: Any, load_config: Any, original: Callable[..., Any]) -> Any:
        mapping = load_config.weight_mapping or []
        raise _CapturedError(
            Skeleton(
                model,
                [entry for entry in mapping if isinstance(entry, WeightRenaming)],
                [entry for entry in mapping if isinstance(entry, WeightConverter)],
            )
        )

    try:
        with _intercepted(capture):
            auto_class(config).from_pretrained(folder, config=config, dtype=dtype)
    except _CapturedError as captured:
        return captured.skeleton
    raise AssertionError("transformers loaded a model without calling its loader")


def build_model(
    folder: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device_map: Mapping[str, torch.device],
    implementation: str,
    prepare: Callable[[Any], Mapping[str, Any]],
) -> Any:
    """Build the model of ``config``, with an experts implementation, and fill it with what ``prepare`` returns.

    ``prepare`` gets the model on the meta device, takes out of it what is not to be loaded, and returns, by the names
    of the model's state dict, tensors or slices (anything that gives a tensor for ``[...]``). ``device_map``: where
    modules go, by name, "" for the model; nothing moves activations from one device to another.
    """

    def fill(model: Any, load_config: Any, original: Callable[..., Any]) -> Any:
        tensors = prepare(model)
        return original(model, dict(tensors), None, dataclasses.replace(load_config, weight_mapping=[]))

    with _intercepted(fill):
        model = auto_class(config).from_pretrained(
            folder, config=config, dtype=dtype, device_map=dict(device_map), experts_implementation=implementation
        )
    if len(set(device_map.values())) > 1:
        # accelerate's hooks, which look at the arguments of each and every module: some milliseconds a token.
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(model)
    return model
