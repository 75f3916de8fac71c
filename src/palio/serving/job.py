"""A request in the default engine, and the completions being generated for it."""

from __future__ import annotations

import contextlib
import math
import time
from concurrent.futures import Future, InvalidStateError

import torch

from palio.serving.drafts import draft_tokens
from palio.serving.prefix_tree import Node
from palio.serving.request import GREEDY_BELOW, Completion, Request, Token
from palio.serving.sampling import sample, seeded
from palio.serving.text import TextStream, Vocabulary, cut, find_stop


class Job:
    """A request that is queued or running."""

    def __init__(self, request: Request, prompt: list[int], context: int, shares: bool) -> None:
        self.request = request
        self.prompt = prompt
        self.limit = min(request.max_new_tokens, context - len(prompt))
        """Maximum of new tokens."""
        # A sequence's own tokens start with the last prompt token: however much of the prompt is shared, one
        # token is left to compute the first logits from. An echoed prompt needs logits everywhere.
        own = 0 if request.echo_prompt or not shares else len(prompt) - 1
        self.shared, self.own_prompt = prompt[:own], prompt[own:]
        self.own = len(self.own_prompt) + max(0, self.limit - 1)
        """Tokens of each sequence that need memory of their own."""
        self.future: Future[list[Completion]] = Future()
        self.submitted = time.monotonic()
        self.generations: list[Generation] = []

    @property
    def tokens(self) -> int:
        """Tokens that need memory, shared or not."""
        return len(self.shared) + self.own * self.request.num_return_sequences

    def settle(self, outcome: list[Completion] | Exception) -> None:
        """Answer the request, unless it has been cancelled."""
        with contextlib.suppress(InvalidStateError):
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)


class Generation:
    """One completion being generated."""

    def __init__(self, job: Job, leaf: Node, number: int, vocabulary: Vocabulary) -> None:
        self.job = job
        self.leaf = leaf
        leaf.tokens = list(job.own_prompt)
        self.known = len(leaf.tokens)
        """Number of the leaf's tokens that are certain; the rest are drafts."""
        self.draft_limit = 4
        """Draft tokens worth verifying: twice the number accepted last time, plus two."""
        self.echoed: list[Token] = []
        self.new: list[Token] = []
        self.text = ""
        self.done = False
        self.greedy = job.request.temperature < GREEDY_BELOW
        self._vocabulary = vocabulary
        self._random = seeded(f"{job.request.seed} {number} {job.request.prompt}")
        self._echo_stream = TextStream(vocabulary, [])
        self._new_stream = TextStream(vocabulary, job.prompt)

    def draft(self, count: int) -> None:
        """Replace the draft by at most `count` tokens."""
        tokens = self.leaf.tokens
        del tokens[self.known :]
        remaining = self.job.limit - len(self.new) - 1  # the last token's logits are never read
        if self.greedy and (count := min(count, self.draft_limit, remaining)) > 0:
            tokens += draft_tokens(self.job.shared + tokens, count)

    def read(self, first: int, logits: torch.Tensor, ends: frozenset[int]) -> int:
        """Take the (rows, vocabulary) logits at the leaf's tokens from `first` on; roll a wrong draft back.

        Returns the number of tokens chosen.
        """
        tokens, chosen = self.leaf.tokens, 0
        for position, (row, best) in enumerate(zip(logits, logits.argmax(-1).tolist(), strict=True), first):
            if self.job.request.echo_prompt and position == 0:
                self.echoed.append(Token(self._echo_stream.add(tokens[0]), 0.0))  # nothing predicts it
            if position + 1 < self.known:  # the next token is certain: the prompt is being echoed
                token = tokens[position + 1]
                self.echoed.append(self._token(row, token, self._echo_stream.add(token)))
                continue
            if self.job.limit == 0:
                self.done = True
                break
            token = self._choose(row, best, ends)
            chosen += 1
            if self.done:
                break
            self.known = position + 2
            if tokens[position + 1 : position + 2] != [token]:
                tokens[position + 1 :] = [token]
                self.leaf.filled = position + 1
                break
        self.draft_limit = 2 * chosen  # all but the last were accepted drafts
        return chosen

    def _choose(self, logits: torch.Tensor, best: int, ends: frozenset[int]) -> int:
        """Choose the next token from (vocabulary,) logits whose maximum is at `best`."""
        request = self.job.request
        token = best if self.greedy else sample(logits, request.temperature, request.top_p, self._random)
        if token in ends:
            self.done = True
            return token
        self.new.append(self._token(logits, token, self._new_stream.add(token)))
        self.text += self.new[-1].text
        if (stop := find_stop(self.text, request.stop_sequences)) is not None:
            self.new = list(cut(self.new, stop).tokens)
            self.done = True
        elif len(self.new) == self.job.limit:
            self.done = True
        return token

    def _token(self, logits: torch.Tensor, token: int, text: str) -> Token:
        logprobs = logits.log_softmax(-1)
        if not math.isfinite(logprob := float(logprobs[token])):
            raise ArithmeticError("a log-probability is not finite")
        values, candidates = logprobs.topk(min(self.job.request.top_k_per_token, len(logprobs)))
        # Tokens with equal text share a key: the most likely one, written last, keeps it.
        top = {
            self._vocabulary.visible([candidate]): value
            for candidate, value in zip(candidates.tolist()[::-1], values.tolist()[::-1], strict=True)
        }
        return Token(text, logprob, top)

    def completion(self) -> Completion:
        tokens = (*self.echoed, *self.new)
        return Completion("".join(token.text for token in tokens), tokens)
