from collections.abc import Callable, Mapping, Sequence

import torch

build: dict[str, str | bool]

def cpu_level() -> str: ...
def cpu_levels() -> list[str]: ...
def is_intel() -> bool: ...

class Unusable(RuntimeError): ...

class PackedKernel:
    def __init__(
        self,
        parameters: Sequence[tuple[str, int]],
        options: Sequence[str],
        dtypes: Mapping[torch.dtype, str],
    ) -> None: ...
    def add(
        self,
        key: str,
        symbol: str,
        threads: int,
        shared: int,
        sizes: Sequence[int],
        maps: Sequence[tuple[int, int, int, Sequence[int]]],
        image: Callable[[], bytes],
    ) -> None: ...
    def key(self, args: tuple, kwargs: dict) -> str | None: ...
    def launch(self, device: int, stream: int, grid: tuple, args: tuple, kwargs: dict) -> bool: ...
