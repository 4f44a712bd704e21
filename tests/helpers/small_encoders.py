"""Small encoders of transformers without dropout, and the packs that a test sees."""

from torch import nn
from transformers import models as m

VOCABULARY = 50
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    **TOKENS,
}
PARTS = [(p, k, n) for p in ("encoder", "decoder") for k, n in (("layers", 2), ("ffn_dim", 48))]
BART = {
    **{f"{part}_{what}": n for part, what, n in PARTS},
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_model": 32,
    **TOKENS,
}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, **TOKENS}


def model_of(package, name, **options):
    """Return a function that makes a model of a package of transformers, without dropout."""

    def make():
        models = getattr(m, package)
        of_model = DISTILBERT if package == "distilbert" else BART if package == "bart" else SIZES
        cls = getattr(models, name)
        made = cls(cls.config_class(**of_model, **options))
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        return made

    return make
