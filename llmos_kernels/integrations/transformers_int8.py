"""int8 weights for Hugging Face transformers: ``quantization_config=LlmosInt8Config()``.

Importing this registers the config and its quantizer under "llmos_int8".
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmos_kernels.ops.int8_linear import MODES, check_threshold
from llmos_kernels.swap.files import describe, prepare
from llmos_kernels.swap.quantize import quantize

METHOD = "llmos_int8"


@register_quantization_config(METHOD)
class LlmosInt8Config(QuantizationConfigMixin):
    """How ``from_pretrained`` makes a model int8: as ``quantize(model, mode, outlier_threshold,
    skip_modules, always=True)`` does, after its float weights are loaded.

    ``skip_modules``: names, or last parts of names; None leaves out the output embeddings, tied weights
    and the last layer, as transformers does. ``modules`` is written by ``save_pretrained``: what is int8
    in the file. Raises ValueError for another mode or threshold.
    """

    def __init__(
        self,
        outlier_threshold: float = 6.0,
        skip_modules: Sequence[str] | None = None,
        mode: str = "dynamic",
        modules: dict[str, dict] | None = None,
        **_: Any,  # quant_method, of a file.
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.outlier_threshold = check_threshold(outlier_threshold)
        self.skip_modules = None if skip_modules is None else list(skip_modules)
        self.mode = mode
        self.modules = modules


@register_quantizer(METHOD)
class LlmosInt8Quantizer(HfQuantizer):
    """What ``from_pretrained`` and ``save_pretrained`` ask for a ``LlmosInt8Config``."""

    quantization_config: LlmosInt8Config

    def _process_model_before_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            if not self.quantization_config.modules:
                raise ValueError("the quantization_config of the file names no int8 modules")
            prepare(model, self.quantization_config.modules)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            config = self.quantization_config
            skip = self.get_modules_to_not_convert(
                model, config.skip_modules, model._keep_in_fp32_modules
            )
            quantize(model, config.mode, config.outlier_threshold, skip, always=True)
            config.modules = describe(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # What is float: biases, norms, adapters.

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype=None):
        raise NotImplementedError("int8 models keep no float weights: load the original")
