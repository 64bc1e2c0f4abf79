"""Continuous batching: one thread computes all answers, token by token, and rows enter and leave between two tokens.

Answers of one adapter are rows of one cache. Adapters take turns of some tokens each, since a pass over the model has
one adapter. Requests get their slots in the order in which they came.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    def keep(self, places: list[int]) -> None:
        """The rows of these answers stay; the slots of the others are free."""
        if len(places) == len(self.questions):
            return
        self.questions = [self.questions[place] for place in places]
        self.answers = [self.answers[place] for place in places]
        if not places:
            # and with the cache the experts' rows that decoding keeps for it
            self.rows = None
        elif self.rows is not None:
            self.rows.keep(places)

    def join(self, entering: "Lane") -> None:
        """Put the rows of `entering` below; it must not be used any more."""
        if self.rows is None:
            self.rows = entering.rows
        elif entering.rows is not None:
            self.rows.join(entering.rows)
        self.questions += entering.questions
        self.answers += entering.answers

    def fail(self) -> None:
        """End the answers that have a row. The rows go: what failed may have changed some layers of them already."""
        failed, self.questions, self.answers, self.rows = self.questions, [], [], None
        for question in failed:
            _tell(question, refusals.failed())


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

    def close(self) -> None:
        """Have it end after the token at hand; whoever waits is told."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def stop(self) -> None:
        """`close`, and wait for the end."""
        self.close()
        self._thread.join()

    def submit(self, question: Question) -> None:
        """Take a request on, or raise `RefusedError`."""
        with self._changed:
            self.check_room()
            self._waiting.append(question)
            self._changed.notify()

    def check_room(self, coming: int = 0) -> None:
        """Raise `RefusedError` where no further request would be taken on now; `coming` are on their way already."""
        if not self.is_alive:
            raise refusals.closing()
        waiting = len(self._waiting) + coming
        if waiting >= self._limits.queue + self._find_free():
            raise refusals.full(waiting)

    def _find_free(self) -> int:
        return self._limits.slots - self.num_running

    def _work(self) -> None:
        while not self._is_closing:
            try:
                self._serve()
            except BaseException:
                # without this thread nobody would be answered any more, nor be told that it took too long; what
                # tokenizers panic with is no Exception
                logger.exception("the engine failed")
                self._refuse_all(refusals.failed())
        self._refuse_all(refusals.closing())

    def _serve(self) -> None:
        """A turn for each lane, once there is work."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._waiting or self.num_running)
        for lane in self._lanes.values():
            self._take_turn(lane)

    def _refuse_all(self, refusal: RefusedError) -> None:
        with self._changed:
            left = [*self._waiting, *(q for lane in self._lanes.values() for q in (*lane.questions, *lane.newcomers))]
            self._waiting.clear()
            self._lanes = {name: Lane(lane.voice) for name, lane in self._lanes.items()}
        for question in left:
            _tell(question, refusal)

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
            with _failing(lane):
                lane.keep(wanted)
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
        if lane.rows is not None:
            with _failing(lane):
                self._roster.activate(lane.voice)
                logits_BV = self._roster.decoder.advance(lane.rows, [answer.last for answer in lane.answers])
                lane.keep(_add_tokens(lane, logits_BV))
        if lane.newcomers and not self._let_in(lane, lane.newcomers):
            # one prompt may be the reason, or all together be too much
            for question in lane.newcomers:
                self._let_in(lane, [question])
        lane.newcomers = []

    def _let_in(self, lane: Lane, newcomers: list[Question]) -> bool:
        """Read prompts at once, and put their rows below those that are there; False where several cannot be read."""
        entering = Lane(lane.voice, newcomers)
        try:
            self._roster.activate(lane.voice)
            entering.answers = [
                Answer(self._roster.tokenizer, self._roster.ends, new.sampling, new.ids) for new in newcomers
            ]
            entering.rows, logits_BV = self._roster.decoder.begin([new.ids for new in newcomers])
        except Exception:
            logger.exception("%s: %d prompt(s) could not be read", lane.voice.name, len(newcomers))
            if len(newcomers) > 1:
                return False
            entering.fail()
            return True
        with _failing(entering):
            entering.keep(_add_tokens(entering, logits_BV))
        with _failing(lane, entering):
            lane.join(entering)
        return True


def _add_tokens(lane: Lane, logits_BV: Tensor) -> list[int]:
    """A token for each answer; the places of those that go on."""
    going = []
    for place, (question, answer) in enumerate(zip(lane.questions, lane.answers, strict=True)):
        try:
            piece = answer.add(logits_BV[place])
        except Exception:
            logger.exception("%s: no token could be chosen", lane.voice.name)
            _tell(question, refusals.failed())
            continue
        _tell(question, piece)
        if piece.finish is None:
            going.append(place)
    return going


@contextmanager
def _failing(*lanes: Lane) -> Iterator[None]:
    """What fails inside ends the answers of these lanes that have a row, and no others."""
    try:
        yield
    except Exception:
        logger.exception("%s: the model failed", lanes[0].voice.name)
        for lane in lanes:
            lane.fail()


def _tell(question: Question, found: Piece | RefusedError) -> None:
    try:
        question.deliver(found)
    except RuntimeError:
        # the event loop of whoever asked is closed
        question.is_abandoned = True
