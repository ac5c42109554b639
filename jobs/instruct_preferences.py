"""Word the prompts of preferences as instructions to translate, and leave out pairs that are too long.

Preference → Preference rows; the rows must have their source and both languages.
"""

from __future__ import annotations

from collections.abc import Sequence

from rayrm.config import parse_args, run_job
from rayrm.instructing import InstructingConfig, TranslationPreference, instruct_preferences, load_renderer
from rayrm.rows import Preference
from rayrm.runs import RowsJob, transform_rows


class InstructPreferences(RowsJob):
    """Instructions for preferences."""

    instructing: InstructingConfig = InstructingConfig()
    """Wording and length."""


def main(argv: Sequence[str] | None = None) -> None:
    """Instruct the preferences of `argv`. Raises CheckpointError when no tokenizer loads."""
    config = parse_args(InstructPreferences, argv)
    load_renderer(config.instructing)
    transform_rows(
        config, TranslationPreference, Preference, lambda rows: instruct_preferences(rows, config.instructing)
    )


if __name__ == "__main__":
    run_job(main)
