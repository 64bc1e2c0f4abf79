"""Continuous batching: one thread computes all answers, token by token, and rows enter and leave between two tokens.

Answers of one adapter are rows of one cache. Adapters take turns of some tokens each, since a pass over the model has
one adapter. Requests get their slots in the order in which they came.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from mixora.answering.answer import Answer, Piece
from mixora.answering.roster import Roster, Voice
from mixora.answering.rows import CachedRows
from mixora.answering.sampling import Sampling
from mixora.endpoint import refusals
from mixora.endpoint.limits import Limits
from mixora.endpoint.refusals import RefusedError

TURN = 16
"""Tokens that one adapter computes while others wait."""

logger = logging.getLogger("mixora")


@dataclass(eq=False)
class Question:
    """One request. `deliver` is called on the engine's thread, with pieces, the last of which says why it is the last,
    or with the refusal that ends the answer. `is_abandoned`: nobody waits any more; may be set on any thread.
    """

    voice: Voice
    ids: list[int]
    sampling: Sampling
    deliver: Callable[[Piece | RefusedError], None]
    deadline: float
    is_abandoned: bool = False


@dataclass
class Lane:
    """The answers of one voice: those that share `rows`, in its order, and those that have a slot and no row yet."""

    voice: Voice
    questions: list[Question] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    rows: CachedRows | None = None
    newcomers: list[Question] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.questions) + len(self.newcomers)


class Engine:
    """Computes answers on a thread of its own, from `start` to `stop`."""

    def __init__(self, roster: Roster, limits: Limits) -> None:
        self._roster, self._limits = roster, limits
        self._waiting: deque[Question] = deque()
        self._lanes = {name: Lane(voice) for name, voice in roster.voices.items()}
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="mixora-engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests on."""
        return self._thread.is_alive() and not self._is_closing

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Slots in use."""
        return sum(map(len, self._lanes.values()))

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def stop(self) -> None:
        """End after the token at hand; whoever waits is told."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def submit(self, question: Question) -> None:
        """Take a request on, or raise `RefusedError`."""
        with self._changed:
            self.check_room()
            self._waiting.append(question)
            self._changed.notify()

    def check_room(self) -> None:
        """Raise `RefusedError` where no further request would be taken on now."""
        if not self.is_alive:
            raise refusals.closing()
        waiting = len(self._waiting)
        if waiting >= self._limits.queue and self._find_free() <= waiting:
            raise refusals.full(waiting)

    def _find_free(self) -> int:
        return self._limits.slots - self.num_running

    def _work(self) -> None:
        while not self._is_closing:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._waiting or self.num_running)
            for lane in self._lanes.values():
                self._take_turn(lane)
        with self._changed:
            left = [*self._waiting, *(q for lane in self._lanes.values() for q in (*lane.questions, *lane.newcomers))]
            self._waiting.clear()
        for question in left:
            _tell(question, refusals.closing())

    def _take_turn(self, lane: Lane) -> None:
        """Some tokens of one lane; without end while no other has work."""
        done = 0
        self._admit()
        while len(lane) and not self._is_closing:
            self._advance(lane)
            self._admit()
            done += 1
            if done >= TURN and any(len(other) for other in self._lanes.values() if other is not lane):
                return

    def _admit(self) -> None:
        """Give slots to those that wait, and end what nobody waits for or what took too long."""
        for lane in self._lanes.values():
            lane.newcomers = [question for question in lane.newcomers if self._is_wanted(question)]
            wanted = [place for place, question in enumerate(lane.questions) if self._is_wanted(question)]
            _keep(lane, wanted)
        with self._changed:
            self._waiting = deque(question for question in self._waiting if self._is_wanted(question))
            while self._waiting and self._find_free() > 0:
                question = self._waiting.popleft()
                self._lanes[question.voice.name].newcomers.append(question)

    def _is_wanted(self, question: Question) -> bool:
        if time.monotonic() > question.deadline and not question.is_abandoned:
            _tell(question, refusals.late(self._limits.seconds))
            return False
        return not question.is_abandoned

    def _advance(self, lane: Lane) -> None:
        """One token for every row of a lane, and the first one for those that come in."""
        self._roster.activate(lane.voice)
        if lane.rows is not None:
            self._advance_rows(lane, lane.rows)
        if lane.newcomers:
            self._let_in(lane)

    def _advance_rows(self, lane: Lane, rows: CachedRows) -> None:
        try:
            logits_BV = self._roster.decoder.advance(rows, [answer.last for answer in lane.answers])
        except Exception:
            logger.exception("the model failed")
            for question in lane.questions:
                _tell(question, refusals.failed())
            _keep(lane, [])
            return
        _keep(lane, _add_tokens(lane.questions, lane.answers, logits_BV))

    def _let_in(self, lane: Lane) -> None:
        """Read the prompts of all newcomers at once, and put them beside those that are there."""
        questions = lane.newcomers
        answers = [Answer(self._roster.tokenizer, self._roster.ends, question.sampling) for question in questions]
        entering = Lane(lane.voice, questions, answers)
        try:
            entering.rows, logits_BV = self._roster.decoder.begin([question.ids for question in questions])
        except Exception:
            logger.exception("the model failed")
            for question in questions:
                _tell(question, refusals.failed())
            lane.newcomers = []
            return
        _keep(entering, _add_tokens(questions, answers, logits_BV))
        if lane.rows is None:
            lane.rows = entering.rows
        elif entering.rows is not None:
            lane.rows.join(entering.rows)
        lane.newcomers = []
        lane.questions += entering.questions
        lane.answers += entering.answers


def _add_tokens(questions: list[Question], answers: list[Answer], logits_BV: Tensor) -> list[int]:
    """A token for each answer; the places of those that go on."""
    going = []
    for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        try:
            piece = answer.add(logits_BV[place])
        except Exception:
            logger.exception("%s: no token could be chosen", question.voice.name)
            _tell(question, refusals.failed())
            continue
        _tell(question, piece)
        if piece.finish is None:
            going.append(place)
    return going


def _keep(lane: Lane, places: list[int]) -> None:
    """The rows of these answers stay; the slots of the others are free."""
    if len(places) == len(lane.questions):
        return
    lane.questions = [lane.questions[place] for place in places]
    lane.answers = [lane.answers[place] for place in places]
    if not places:
        # and with the cache the experts' rows that decoding keeps for it
        lane.rows = None
    elif lane.rows is not None:
        lane.rows.keep(places)


def _tell(question: Question, found: Piece | RefusedError) -> None:
    try:
        question.deliver(found)
    except RuntimeError:
        # the event loop of whoever asked is closed
        question.is_abandoned = True
