"""The embeddings of BERT.

Source: Devlin et al. 2018, arXiv:1810.04805.
"""

from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.nn.norm import LayerNorm
from llmos_kernels.ops._dropout import check_dropout
from llmos_kernels.ops.embedding import embedding_layer_norm


class BertEmbedding(nn.Module):
    """Word, token type and position embeddings: added, normalized and dropped out in one pass.

    The state dict is that of BERT's embeddings.

    Args:
        vocab_size: the number of words.
        hidden_size: the width of the embeddings.
        max_position: the number of positions.
        type_vocab_size: the number of token types.
        padding_idx: the word whose embedding gets no gradient; None: there is none.
        eps: is added to the variance in the norm.
        dropout: the probability of dropping an element in training.
        device: of the parameters.
        dtype: of the parameters.

    Returns:
        ``forward(input_ids, token_type_ids, position_ids)`` takes integers [batch, length], and for
        the last two any shape that broadcasts to it. Their defaults are type 0 and positions 0, 1,
        ... It returns [batch, length, hidden_size].

    Raises:
        ValueError: ``dropout`` is outside [0, 1).

        For indices that are out of range see ``embedding_layer_norm``.

    Example:
        >>> BertEmbedding(30522, 768)(torch.randint(30522, (8, 128))).shape
        torch.Size([8, 128, 768])
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        max_position: int = 512,
        type_vocab_size: int = 2,
        padding_idx: int | None = 0,
        eps: float = 1e-12,
        dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dropout(dropout)
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size, padding_idx, **options)
        self.position_embeddings = nn.Embedding(max_position, hidden_size, **options)
        self.token_type_embeddings = nn.Embedding(type_vocab_size, hidden_size, **options)
        self.LayerNorm = LayerNorm(hidden_size, eps, **options)
        self.dropout = dropout

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        if token_type_ids is None:
            token_type_ids = input_ids.new_zeros(())
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device)
        parts = self.word_embeddings, self.token_type_embeddings, self.position_embeddings
        return embedding_layer_norm(
            (input_ids, token_type_ids, position_ids),
            [part.weight for part in parts],
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.LayerNorm.eps,
            self.dropout,
            self.training,
            padding_idx=[part.padding_idx for part in parts],
        )

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"
