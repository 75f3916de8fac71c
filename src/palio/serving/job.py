"""A request on its way through the default engine, and the completions it is being answered with."""

from __future__ import annotations

import random
import time
from concurrent.futures import Future

import torch

from palio.serving.drafts import guess
from palio.serving.engine import GREEDY_BELOW, Completion, Request, Token
from palio.serving.prefix_tree import Node
from palio.serving.sampling import draw, most_likely
from palio.serving.text import TextStream, Vocabulary, cut, find_stop


class Job:
    """A request on its way."""

    def __init__(self, request: Request, prompt: list[int], context: int, shares: bool) -> None:
        self.request = request
        self.prompt = prompt
        self.limit = min(request.max_new_tokens, context - len(prompt))
        """New tokens."""
        # A sequence's own tokens begin with the prompt's last: however much of the prompt is shared, there
        # is a token left to compute the next one's logits from. What must be computed anew is all its own.
        alone = request.echo_prompt or not shares
        self.shared = [] if alone else prompt[:-1]
        self.begun = prompt if alone else prompt[-1:]
        self.own = len(self.begun) + max(0, self.limit - 1)
        """Tokens of each sequence that need room of their own."""
        self.future: Future[list[Completion]] = Future()
        self.submitted = time.monotonic()
        self.writers: list[Writer] = []

    @property
    def tokens(self) -> int:
        """That need room, shared or not."""
        return len(self.shared) + self.own * self.request.num_return_sequences


class Writer:
    """One completion being written."""

    def __init__(self, job: Job, leaf: Node, number: int, vocabulary: Vocabulary) -> None:
        self.job = job
        self.leaf = leaf
        leaf.tokens = list(job.begun)
        self.known = len(leaf.tokens)
        """Of the leaf's tokens; the ones behind are guesses."""
        self.reach = 4
        """Guesses worth making: twice as many as were right the last time, and two."""
        self.echoed: list[Token] = []
        self.written: list[Token] = []
        self.text = ""
        self.done = False
        self.greedy = job.request.temperature < GREEDY_BELOW
        self._vocabulary = vocabulary
        self._random = random.Random(f"{job.request.seed} {number} {job.request.prompt}")
        self._echo = TextStream(vocabulary, [])
        self._stream = TextStream(vocabulary, job.prompt)

    def draft(self, count: int) -> None:
        """Put up to `count` guesses behind what is known, in place of older ones."""
        tokens = self.leaf.tokens
        del tokens[self.known :]
        left = self.job.limit - len(self.written) - 1  # nothing is read behind the last token
        if self.greedy and (count := min(count, self.reach, left)) > 0:
            tokens += guess(self.job.shared + tokens, count)

    def read(self, first: int, logits: torch.Tensor, ends: frozenset[int]) -> int:
        """Take the (rows, vocabulary) logits behind the leaf's tokens from `first` on.

        What was computed behind a wrong guess is rolled back. Returns how many tokens were chosen.
        """
        tokens, chosen = self.leaf.tokens, 0
        for position, (row, best) in enumerate(zip(logits, logits.argmax(-1).tolist(), strict=True), first):
            if self.job.request.echo_prompt and position == 0:
                self.echoed.append(Token(self._echo.add(tokens[0]), 0.0))  # nothing predicts the first
            if position + 1 < self.known:  # the next token is known: the prompt is echoed
                token = tokens[position + 1]
                self.echoed.append(self._token(row, token, self._echo.add(token)))
                continue
            if self.job.limit == 0:
                self.done = True
                break
            token = self._write(row, best, ends)
            chosen += 1
            if self.done:
                break
            self.known = position + 2
            if tokens[position + 1 : position + 2] != [token]:
                tokens[position + 1 :] = [token]
                self.leaf.filled = position + 1
                break
        self.reach = 2 * chosen  # all chosen but the last were guessed
        return chosen

    def _write(self, logits: torch.Tensor, best: int, ends: frozenset[int]) -> int:
        """Choose the next token by (vocabulary,) logits, whose largest is `best`; it may be the last."""
        request = self.job.request
        token = best if self.greedy else draw(logits, request.temperature, request.top_p, self._random)
        if token in ends:
            self.done = True
            return token
        self.written.append(self._token(logits, token, self._stream.add(token)))
        self.text += self.written[-1].text
        if (stop := find_stop(self.text, request.stop_sequences)) is not None:
            self.written = list(cut(self.written, stop).tokens)
            self.done = True
        elif len(self.written) == self.job.limit:
            self.done = True
        return token

    def _token(self, logits: torch.Tensor, token: int, text: str) -> Token:
        logprobs = logits.log_softmax(-1)
        best = most_likely(logprobs, self.job.request.top_k_per_token)
        top = {self._vocabulary.visible([one]): value for one, value in reversed(best)}
        return Token(text, float(logprobs[token]), top)

    def completion(self) -> Completion:
        tokens = (*self.echoed, *self.written)
        return Completion("".join(token.text for token in tokens), tokens)
