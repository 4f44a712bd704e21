"""The embeddings of BERT."""

import torch
from torch import Tensor, nn

from llmos_kernels.nn.norm import LayerNorm
from llmos_kernels.ops._dropout import check_dropout
from llmos_kernels.ops.embedding import embedding_layer_norm


class BertEmbedding(nn.Module):
    """Word, token type and position embeddings, added, normalised and dropped out in one pass.

    The state dict is that of BERT's embeddings. ``forward`` takes ``input_ids`` [batch, length] and,
    of shapes that broadcast to it, ``token_type_ids`` (default: type 0) and ``position_ids``
    (default: 0, 1, ...); it returns [batch, length, hidden_size]. Raises ValueError for a
    ``dropout`` outside [0, 1); indices as ``embedding_layer_norm``.
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
        device=None,
        dtype=None,
    ) -> None:
        check_dropout(dropout)
        super().__init__()
        options = {"device": device, "dtype": dtype}
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
