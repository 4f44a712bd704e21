"""int8 weights for Hugging Face transformers: ``quantization_config=LlmosInt8Config()``.

Importing this module registers the config and its quantizer with transformers, as "llmos_int8".
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmos_kernels.nn.int8 import Int8Linear
from llmos_kernels.ops.int8_linear import MODES, check_threshold
from llmos_kernels.swap.checkpoint import describe, prepare
from llmos_kernels.swap.quantize import quantize

#: The quantization method in the config of a saved model.
METHOD = "llmos_int8"


@register_quantization_config(METHOD)
class LlmosInt8Config(QuantizationConfigMixin):
    """Makes ``from_pretrained`` quantize the linear layers of a model after it has loaded them.

    The layers become int8 whether that is faster or not, see ``llmos_kernels.quantize`` with
    ``always=True``. To load an int8 model that was saved, import this class first.

    Args:
        outlier_threshold: as for ``quantize``.
        skip_modules: names, or last parts of names, of modules to leave out. None leaves out the
            output embeddings, tied weights and the last layer, as transformers does.
        mode: "dynamic" or "weight_only".
        modules: which modules are int8 in the file. ``save_pretrained`` writes it.

    Raises:
        ValueError: another mode or threshold.

    Example:
        >>> config = LlmosInt8Config(outlier_threshold=6.0)
        >>> model = AutoModel.from_pretrained(path, quantization_config=config)
        >>> model.save_pretrained("folder")
    """

    def __init__(
        self,
        outlier_threshold: float = 6.0,
        skip_modules: Sequence[str] | None = None,
        mode: str = "dynamic",
        modules: dict[str, dict[str, Any]] | None = None,
        **_: Any,  # A saved config also has quant_method.
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
    """Does the work of a ``LlmosInt8Config`` for ``from_pretrained`` and ``save_pretrained``."""

    quantization_config: LlmosInt8Config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            if not self.quantization_config.modules:
                raise ValueError("the quantization_config of the file names no int8 modules")
            prepare(model, self.quantization_config.modules)
            for module in model.modules():
                if isinstance(module, Int8Linear):
                    # transformers would draw a random float weight for it.
                    module._is_hf_initialized = True
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            config = self.quantization_config
            skip = self.get_modules_to_not_convert(
                model, config.skip_modules, model._keep_in_fp32_modules
            )
            quantize(model, config.mode, config.outlier_threshold, skip, always=True)
            config.modules = describe(model)
        return model

    def is_serializable(self) -> bool:
        """True: int8 models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: biases, norms and adapters are float and can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: ``torch.compile`` takes int8 layers."""
        return True

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> Any:
        raise NotImplementedError("int8 models keep no float weights: load the original")
