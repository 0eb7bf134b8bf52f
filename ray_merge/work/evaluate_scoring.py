"""Scores of one model on the rows of one task, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ray_merge.algebra.metrics import CLASSES, NUMBERS, perplexity, places_in_pool
from ray_merge.errors import RunFailed
from ray_merge.models.stage_calls import Alter, StageOutput
from ray_merge.pool import Turn
from ray_merge.work.evaluate_answers import Arrays, continued, groups, negative_log_likelihood, says
from ray_merge.work.evaluate_heads import Heads, pooled
from ray_merge.work.evaluate_job import HITS_AT, Score, ScoredModel, ScoredTask
from ray_merge.work.evaluate_rows import LabelledRows, Wanted
from ray_merge.work.hand_on import stage_input
from ray_merge.work.held import Held


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """One model in front of one task's rows.

    Args:
        model: which.
        task: whose rows.
        held: its weights.
        heads: the task's own, or those of a pool of tasks that it is one of.
        device: torch device.
    """

    model: ScoredModel
    task: ScoredTask
    held: Held
    heads: Heads
    device: str

    def labels(self, rows: LabelledRows, turn: Turn) -> Score:
        """The score of a classification or regression, and joint hits where several heads answer."""
        pool, is_class = self.heads.tasks, self.task.answer == "classification"
        offset = sum(one.n_outputs for one in pool[: [one.name for one in pool].index(self.task.name)])
        predicted, labels, places = [], [], []
        for batch, given in zip(rows.batches, rows.labels, strict=True):
            turn.check()
            right_B = torch.tensor(given, dtype=torch.float64)
            answers = self._answers(batch)
            own_BC = answers[self.task.name]
            predicted.append(own_BC.argmax(dim=1) if is_class else own_BC[:, 0])
            labels.append(right_B.long() if is_class else right_B)
            if len(pool) > 1:
                places.append(places_in_pool(pooled(answers, pool), right_B.long() + offset))
        metric = {**CLASSES, **NUMBERS}[self.task.evaluation.metric]
        value = metric(torch.cat(predicted), torch.cat(labels))
        hits = [float((torch.cat(places) <= k).double().mean()) for k in HITS_AT] if places else []
        return Score(value, rows.n_rows, tuple(hits))

    def _answers(self, batch: Arrays) -> dict[str, Tensor]:
        """Task -> (B, C) float64 on the CPU."""
        given = self.held.padded(stage_input(self.held.decoding(batch), self.device))

        def forward(altered: Alter | None) -> StageOutput:
            return self.held.stage.forward(given, altered=altered, to_end=True)

        n_rows, found = len(next(iter(batch.values()))), self.heads.answers(forward)
        return {
            one.name: self._checked(found[one.name], (n_rows, one.n_outputs)).double().cpu()
            for one in self.heads.tasks
        }

    def _checked(self, logits: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        if logits is None or tuple(logits.shape) != shape:
            found = None if logits is None else tuple(logits.shape)
            raise RunFailed(
                f"{self.model.name} gives logits {found} on {self.task.name} where {shape} were planned; correct "
                f"adapters.{self.task.name}.task"
            )
        if bool(torch.isnan(logits).any()):
            raise RunFailed(
                f"{self.model.name} ({self.model.checkpoint.url}) gives NaN on {self.task.name}, which has no score; "
                "leave it out with --only"
            )
        return logits

    def text(self, rows: LabelledRows, turn: Turn, ends: frozenset[int]) -> float:
        """Perplexity of the texts, or the share whose answers begin with their label (`says`)."""
        if self.task.evaluation.metric == "perplexity":
            found = [self._nats(batch, turn) for batch in rows.batches]
            return perplexity(sum(nats for nats, _ in found), sum(tokens for _, tokens in found))
        right = 0
        for batch, given in zip(rows.batches, rows.labels, strict=True):
            right += self._right(batch, cast("list[Wanted]", given), rows, turn, ends)
        return right / rows.n_rows

    def _nats(self, batch: Arrays, turn: Turn) -> tuple[float, int]:
        nats, tokens = 0.0, 0
        for _, some in groups(batch, self._vocabulary):
            turn.check()
            one = negative_log_likelihood(self._logits(some, turn), some)
            nats, tokens = nats + one[0], tokens + one[1]
        return nats, tokens

    def _right(
        self, batch: Arrays, wanted: list[Wanted], rows: LabelledRows, turn: Turn, ends: frozenset[int]
    ) -> int:
        assert rows.tokenizer is not None
        decode = partial(rows.tokenizer.call.decode, skip_special_tokens=True)
        right = 0
        longest = max(one.n_tokens for one in wanted)
        for span, some in groups(batch, self._vocabulary, longest):
            mine = wanted[span]
            said = continued(lambda one: self._logits(one, turn), some, [one.n_tokens for one in mine], ends)
            right += sum(says(tokens, one.text, decode) for tokens, one in zip(said, mine, strict=True))
        return right

    def _logits(self, batch: Arrays, turn: Turn) -> Tensor:
        """(B, L, V) on the device."""
        turn.check()
        given = stage_input(batch, self.device)
        out = self.held.stage.forward(given, altered=self.heads.alone(), to_end=True)
        last = -1 if out.logits is None else out.logits.shape[-1]
        return self._checked(out.logits, (*batch["input_ids"].shape, last))

    @property
    def _vocabulary(self) -> int:
        config: Any = self.held.text_config
        return int(config.vocab_size)
