"""Who gets the prizes of a track, as far as its questions and trainings can tell.

A statistic is the difference of two entries' final scores over its standard error in the draws of questions
and trainings (`palio.scoring.uncertainty`). It is held against the draws of the same difference.

Places. The boundary below a place stands if every entry above it is better than every entry below it: its p
value is the largest of these comparisons (an intersection-union test; that the tests themselves decide who is
above costs nothing if they are two-sided: Gutmann and Maymin, 1987). The boundaries of all prizes are
corrected by Holm. Between two boundaries that stand is one entry, or several that share.

Contention. If the last boundary does not stand, who shares? All but those that cannot have one of the places,
by ranks that hold for all entries at once (Mogstad, Romano, Shaikh and Wilhelm, 2024): between 1 + the
entries that are better and n - the entries that are worse, where "better" is corrected for all pairs by the
largest statistic in the draws, step by step (Romano and Wolf, 2005).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palio.config import Prizes
from palio.provenance import fingerprint
from palio.records import Award, Boundary, Chance, Comparison, Decision, Leaderboard, Remedy
from palio.scoring.conventions import TIE, Array
from palio.scoring.formula import ranks
from palio.scoring.training_noise import explanation
from palio.scoring.uncertainty import AnswersByScenario, Draws, draw

DRAWS = 1000
WORDS = {
    "share": "they share",
    "more_questions": "the rules ask for more questions first",
    "more_seeds": "the rules ask for more trainings first",
}


@dataclass(frozen=True)
class Differences:
    """Comparisons of all entries, by score: arrays of shape (entries, entries), row against column."""

    names: Sequence[str]
    """Entry ids, best first."""
    estimate: Array
    """Shape (entries,): final scores of the means over all trainings."""
    draws: Array
    """Shape (draws, entries): final scores, around their mean."""
    error: Array
    """Standard error of the difference."""
    of_questions: Array
    """The part of it that is due to the questions."""
    covers_training: bool

    @property
    def difference(self) -> Array:
        return self.estimate[:, None] - self.estimate[None, :]

    @property
    def statistic(self) -> Array:
        """Differences in standard errors; infinite if there is no error, 0 if there is no difference."""
        size = np.abs(self.difference)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(size > TIE, size / self.error, 0.0)

    def drawn(self, row: int, columns: NDArray[np.int64]) -> Array:
        """Return the size of drawn differences in standard errors, shape (draws, columns)."""
        size = np.abs(self.draws[:, [row]] - self.draws[:, columns])
        error = self.error[row, columns]
        return np.asarray(np.divide(size, error, out=np.zeros(size.shape), where=error > 0))

    def p(self, row: int, columns: NDArray[np.int64]) -> Array:
        """Return two-sided p values of comparisons, each alone."""
        statistic = self.statistic[row, columns]
        at_least = (self.drawn(row, columns) >= statistic).sum(axis=0)
        return np.asarray(np.where(statistic > 0, (1 + at_least) / (1 + len(self.draws)), 1.0))


def decide(
    board: Leaderboard,
    answers: AnswersByScenario,
    prizes: Prizes,
    *,
    training_noise: float | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    remark: str = "",
) -> Decision | None:
    """Decide the prizes of a track; None without entries.

    Args:
        answers: as for `palio.scoring.uncertainty.uncertainty`.
        training_noise: assumed standard deviation of a value between trainings, if no entry has replicates.
        remark: a sentence to add to what the tests cover.
    """
    if not board.entries:
        return None
    drawn = draw(board, answers, replicates=draws, seed=seed, training_noise=training_noise)
    order = _by_score(board, drawn)
    differences = differences_of(board, drawn, order)
    adjusted, separated = separated_pairs(differences, prizes.alpha)
    boundaries = _boundaries(differences, prizes)
    best_rank, worst_rank = 1 + separated.sum(axis=0), len(order) - separated.sum(axis=1)
    rank = ranks(drawn.all.final)[:, order]
    covers = explanation(drawn.effects.record if drawn.effects else None)
    return Decision(
        competition=board.competition,
        track=board.track,
        final=board.final,
        leaderboard_fingerprint=fingerprint(board.model_dump(mode="json")),
        places=prizes.places,
        alpha=prizes.alpha,
        not_separable=prizes.not_separable,
        awards=_awards(differences, boundaries, best_rank, prizes),
        chances=[
            Chance(
                entry=name,
                score=float(differences.estimate[index]),
                places=[float(np.mean(rank[:, index] == place)) for place in range(1, prizes.places + 1)],
                best_rank=int(best_rank[index]),
                worst_rank=int(worst_rank[index]),
            )
            for index, name in enumerate(differences.names)
        ],
        boundaries=boundaries,
        comparisons=[
            comparison
            for row in range(min(prizes.places, len(order)))
            for comparison in _comparisons(differences, row, adjusted, separated)
        ],
        pairs=len(order) * (len(order) - 1) // 2,
        draws=draws,
        seed=seed,
        covers=f"{remark} {covers}".strip(),
    )


def _by_score(board: Leaderboard, drawn: Draws) -> list[int]:
    """Return the places of the entries on the leaderboard, by the mean score of all trainings."""
    names = [scored.entry for scored in board.entries]
    return sorted(range(len(names)), key=lambda index: (-drawn.estimate.final[index], names[index]))


# --- tests ---------------------------------------------------------------------------------------------


def differences_of(board: Leaderboard, drawn: Draws, order: Sequence[int]) -> Differences:
    final = drawn.all.final[:, order]
    return Differences(
        names=[board.entries[index].entry for index in order],
        estimate=drawn.estimate.final[order],
        draws=final - final.mean(axis=0),
        error=_errors(final),
        of_questions=_errors(drawn.questions.final[:, order]),
        covers_training=drawn.effects is not None,
    )


def _errors(final: Array) -> Array:
    """Return the standard deviation of every difference of two columns of draws."""
    covariance = np.atleast_2d(np.cov(final, rowvar=False))
    variance = np.diag(covariance)
    squared = variance[:, None] + variance[None, :] - 2 * covariance
    return np.sqrt(np.where(squared > TIE**2, squared, 0.0))


def separated_pairs(differences: Differences, alpha: float) -> tuple[Array, NDArray[np.bool_]]:
    """Return p values corrected for all pairs of entries, and whether the row's is better than the column's.

    With the probability 1 - alpha, no pair is separated the wrong way or without a difference.
    """
    statistic, itself = differences.statistic, np.eye(len(differences.names), dtype=bool)
    left, adjusted = ~itself, np.ones(itself.shape)
    while left.any():
        largest = np.sort(_largest(differences, left))
        p = (1 + len(largest) - np.searchsorted(largest, statistic, side="left")) / (1 + len(largest))
        # Stepping down, a p value is never smaller than one of a pair that was separated before.
        adjusted[left] = np.maximum(p[left], adjusted[~left & ~itself].max(initial=0.0))
        found = left & (adjusted <= alpha) & (statistic > 0)
        if not found.any():
            break
        left &= ~found
    return adjusted, ~left & ~itself & (differences.difference > 0)


def _largest(differences: Differences, pairs: NDArray[np.bool_]) -> Array:
    """Return the largest statistic among `pairs` in every draw, an entry at a time to save memory."""
    largest = np.zeros(len(differences.draws))
    for row in range(len(pairs) - 1):
        columns = row + 1 + np.flatnonzero(pairs[row, row + 1 :])
        if len(columns):
            np.maximum(largest, differences.drawn(row, columns).max(axis=1), out=largest)
    return largest


def _boundaries(differences: Differences, prizes: Prizes) -> list[Boundary]:
    """Test the boundary below each place with a prize; below the last entry there is none."""
    count = min(prizes.places, len(differences.names) - 1)
    weakest = []
    for place in range(1, count + 1):
        below = np.arange(place, len(differences.names))
        p = np.stack([differences.p(row, below) for row in range(place)])
        row, column = divmod(int(np.argmax(p)), p.shape[1])
        weakest.append((float(p[row, column]), row, place + column))
    found: dict[int, Boundary] = {}
    stands = True
    for step, index in enumerate(sorted(range(count), key=lambda index: weakest[index])):
        p_value, row, column = weakest[index]
        level = prizes.alpha / (count - step)
        stands = stands and p_value <= level
        found[index] = Boundary(
            place=index + 1,
            better=differences.names[row],
            worse=differences.names[column],
            p=p_value,
            level=level,
            stands=stands,
            remedy=None if stands else _remedy(differences, row, column, level),
        )
    return [found[index] for index in range(count)]


def _remedy(differences: Differences, row: int, column: int, level: float) -> Remedy:
    """Say what would separate two entries at the difference seen, if the critical value stays.

    The squared error is that of the questions, which shrinks with their number, and that of training, which
    shrinks with the number of trainings.
    """
    difference = abs(float(differences.difference[row, column]))
    critical = float(np.quantile(differences.drawn(row, np.array([column])), 1 - level))
    allowed = (difference / critical) ** 2 if critical > 0 else 0.0
    questions = float(differences.of_questions[row, column]) ** 2
    training = (
        max(0.0, float(differences.error[row, column]) ** 2 - questions)
        if differences.covers_training
        else 0.0
    )
    times_questions = questions / (allowed - training) if allowed > training else None
    times_trainings = training / (allowed - questions) if training and allowed > questions else None
    ways = [f"{_times(times_questions)} as many questions"] if times_questions else []
    ways += [f"{_times(times_trainings)} as many trainings of both"] if times_trainings else []
    if difference <= TIE:
        text = "nothing: they have the same score"
    elif ways:
        text = f"about {' or '.join(ways)}, at this difference"
    else:
        text = "more questions and more trainings, at this difference"
    return Remedy(times_questions=times_questions, times_trainings=times_trainings, text=text)


def _times(factor: float) -> str:
    return f"{factor:.1f} times" if factor < 10 else f"{factor:,.0f} times"


def _comparisons(
    differences: Differences, row: int, adjusted: Array, separated: NDArray[np.bool_]
) -> list[Comparison]:
    columns = np.arange(row + 1, len(differences.names))
    return [
        Comparison(
            better=differences.names[row],
            worse=differences.names[column],
            difference=float(differences.difference[row, column]),
            standard_error=float(differences.error[row, column]),
            of_questions=_share_of_questions(differences, row, column),
            p=float(p),
            p_corrected=float(adjusted[row, column]),
            separated=bool(separated[row, column]),
        )
        for column, p in zip(columns.tolist(), differences.p(row, columns), strict=True)
    ]


def _share_of_questions(differences: Differences, row: int, column: int) -> float:
    """Return the share of the squared standard error that is due to the questions; 1 if there is no error."""
    error = float(differences.error[row, column])
    return min(1.0, (float(differences.of_questions[row, column]) / error) ** 2) if error > 0 else 1.0


# --- awards --------------------------------------------------------------------------------------------


def _awards(
    differences: Differences, boundaries: Sequence[Boundary], best_rank: NDArray[np.int64], prizes: Prizes
) -> list[Award]:
    """Return the awards: the places between two boundaries that stand are decided together."""
    places = min(prizes.places, len(differences.names))
    standing = [boundary.place for boundary in boundaries if boundary.stands]
    if places == len(differences.names):
        standing.append(places)  # nobody is below
    awards, above = [], 0
    for last in dict.fromkeys([*standing, places]):
        if last == above:
            continue
        group = list(range(above + 1, last + 1))
        below = range(last, len(differences.names)) if last not in standing else ()
        others = [index for index in below if best_rank[index] <= places]
        entries = [differences.names[index] for index in (*range(above, last), *others)]
        awards.append(_award(group, entries, prizes))
        above = last
    return awards


def _award(places: list[int], entries: list[str], prizes: Prizes) -> Award:
    title = f"Place {places[0]}" if len(places) == 1 else f"Places {places[0]} to {places[-1]}"
    if len(entries) == 1:
        return Award(places=places, entries=entries, outcome="awarded", text=f"{title}: {entries[0]}.")
    return Award(
        places=places,
        entries=entries,
        outcome="shared" if prizes.not_separable == "share" else prizes.not_separable,
        text=f"{title}: {', '.join(entries)} cannot be told apart; {WORDS[prizes.not_separable]}.",
    )
