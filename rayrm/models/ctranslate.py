"""Translation by CTranslate2, an optional package, from a folder that its converter has written.

`ct2-transformers-converter --model MODEL --output_dir FOLDER --copy_files tokenizer.json tokenizer_config.json`
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

MODEL_FILE = "model.bin"


def is_converted(folder: str) -> bool:
    """Whether a folder holds a model in CTranslate2's format."""
    return Path(folder, MODEL_FILE).is_file()


class CTranslate2Engine:
    """A converted encoder-decoder. Raises ConfigError without the package, and CheckpointError when it does not load.

    `dtype` None keeps the number format that the model was converted to, int8 included.
    """

    def __init__(self, folder: str, tokenizer: Any, device: str, dtype: torch.dtype | None) -> None:
        import torch

        try:
            import ctranslate2
        except ImportError as error:
            raise ConfigError(f"'{folder}' is a CTranslate2 model; run `pip install ctranslate2` to use it.") from error
        self.tokenizer = tokenizer
        kind, _, index = device.partition(":")
        number_format = "default" if dtype is None else str(dtype).removeprefix("torch.")
        settings = {"device": kind, "device_index": int(index or 0), "compute_type": number_format}
        try:
            self.model = ctranslate2.Translator(folder, intra_threads=torch.get_num_threads(), **settings)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"'{folder}' does not load as a CTranslate2 model: {error}.") from error

    def generate(self, rows: list[list[int]], target: int, bounds: list[int], num_beams: int) -> list[list[int]]:
        """As `TransformersEngine.generate`."""
        name = self.tokenizer.convert_ids_to_tokens
        found: list[list[int]] = [[] for _ in rows]
        # One call has one bound.
        for bound, group in groupby(sorted(range(len(rows)), key=bounds.__getitem__), key=bounds.__getitem__):
            places = list(group)
            results = self.model.translate_batch(
                [name(rows[place]) for place in places],
                target_prefix=[[name(target)]] * len(places),
                beam_size=num_beams,
                max_decoding_length=bound,
                return_end_token=True,
            )
            for place, result in zip(places, results, strict=True):
                found[place] = self.tokenizer.convert_tokens_to_ids(result.hypotheses[0])
        return found
