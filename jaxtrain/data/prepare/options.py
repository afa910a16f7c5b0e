"""Options of `prepare` and of a stream's windows: how rows become token rows."""

import dataclasses

from jaxtrain.data.batches import pack
from jaxtrain.data.batches.dataset import ROW_MULTIPLE
from jaxtrain.data.rows.columns import ColumnMap
from jaxtrain.data.rows.marks import ALL_TURNS, AssistantMarks

OBJECTIVES = ("next_token", "preference", "labeled")


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """How raw rows are read, tokenized, truncated, packed and padded.

    Attributes:
        objective: "next_token", "preference" or "labeled". The last takes preference
            rows too, each as two completions.
        max_length: longest sequence in tokens; None keeps all (not with packing).
        max_prompt_length: preference rows keep only the end of a longer prompt.
        packing: None (one document per row), "bfd" (best fit, long documents are cut),
            "bfd_split" (long documents are split), or "wrapped" (TRL's cut stream).
        completion_only_loss: see `tokenize_examples`, also for the next one.
        assistant_only_loss: train on assistant turns alone.
        assistant_marks: which of these turns are trained, and which parts of them.
        on_bad_row: "error" refuses the data set, "skip" leaves bad rows out.
        kind: read the rows as this format, see `detect_format`.
        text_column: the column of text rows.
        column_map: pairs of a column that is read and its name in the file.
        pad_to: "longest" row or "max_length"; T is this length, rounded up.
        pad_to_multiple: T is a multiple of this.
        batch_size: number of rows that are tokenized at once.
        difficulty_column: a column of numbers to order a curriculum by.
        share_prompts: a preference row holds its prompt once, then both completions.
            Packed rows hold up to 2 * max_length tokens of such pairs.
        exchange_within: labeled rows take the completions for KTO's KL term from one
            another within so many rows, see `mismatch_completions` (0: all).
        most_pairs: upper limit on the pairs in a packed row (0: no limit).
        vocab_size: rows with a token id of this or more are bad; None if the tokenizer
            has no such id.

    Raises:
        ValueError: options contradict one another.
    """

    objective: str
    max_length: int | None
    max_prompt_length: int | None = None
    packing: str | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    assistant_marks: AssistantMarks = ALL_TURNS
    on_bad_row: str = "error"
    kind: str = "auto"
    text_column: str = "text"
    pad_to: str = "longest"
    pad_to_multiple: int = ROW_MULTIPLE
    batch_size: int = 1000
    difficulty_column: str | None = None
    share_prompts: bool = False
    exchange_within: int = 0
    most_pairs: int = 0
    vocab_size: int | None = None
    column_map: ColumnMap = ()

    def __post_init__(self) -> None:
        packing, max_length = self.packing, self.max_length
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r}: use one of {OBJECTIVES}")
        if packing is not None and packing not in pack.STRATEGIES:
            raise ValueError(
                f"packing={packing!r}: use one of {pack.STRATEGIES} or None"
            )
        if self.objective == "labeled" and packing is not None:
            raise ValueError(
                f"packing={packing!r}: labeled rows (KTO) cannot be packed; set"
                " packing=None (data.packing = false)"
            )
        if self.objective == "preference" and packing not in (None, "bfd"):
            raise ValueError(
                f"packing={packing!r}: preference pairs are never split; use 'bfd'"
            )
        if self.pad_to not in ("longest", "max_length"):
            raise ValueError(f"pad_to={self.pad_to!r}: use 'longest' or 'max_length'")
        if max_length is None and (packing is not None or self.pad_to == "max_length"):
            raise ValueError(
                f"max_length=None with packing={packing!r}, pad_to={self.pad_to!r}: "
                "give the length of a row in tokens"
            )
        if max_length is not None and max_length < 2:
            raise ValueError(
                f"max_length={max_length}: must be at least 2, because the first token"
                " of a row is never predicted"
            )
        if self.assistant_marks != ALL_TURNS and not self.assistant_only_loss:
            raise ValueError(
                f"assistant_marks={self.assistant_marks} select among the assistant's"
                " turns: set assistant_only_loss=True"
            )
        if self.max_prompt_length is not None:
            self._check_prompt_length(self.max_prompt_length)

    def _check_prompt_length(self, tokens: int) -> None:
        if self.objective != "preference":
            raise ValueError(
                f"max_prompt_length={tokens} acts on preference rows only: set "
                "max_length for SFT, or leave max_prompt_length unset"
            )
        if tokens < 1 or tokens >= (self.max_length or 1 << 62):
            raise ValueError(
                f"max_prompt_length={tokens} must lie between 1 and "
                f"max_length={self.max_length} - 1, to leave room for the completion"
            )
