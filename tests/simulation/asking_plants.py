"""Bugs planted on purpose into what comes down, one at a time."""

from __future__ import annotations

from tidegate.gateway.inbox import KEEP, Inbox
from tidegate.store.answers import Answers
from tidegate.uplink.asking import Asker
from tidegate.uplink.asking_lane import AskingLane
from tidegate.uplink.crowd import Question

from .asking import Asking


class HastyInbox(Inbox):
    def _take(self, found: Answers) -> None:
        broker = self._broker
        self._looking = True
        broker.log.change(KEEP, found.cursor, found.answers[-1][0].id)
        broker.when_durable(super()._take, found)
        broker.turn_over()


class PlaceBeforeEffect(Asking):
    """The broker's place in the inbox is in a commit before that of what the answers do."""

    inbox_type = HastyInbox


class ForgetfulLane(AskingLane):
    def _fetch(self, asker: Asker, questions: list[Question]) -> int:
        for question in questions:
            self._crowd.answered(question)
        self._save()
        return super()._fetch(asker, questions)


class QuestionForgotten(Asking):
    """A question is forgotten before its answer is kept."""

    lane_type = ForgetfulLane


ASKING_PLANTS = (PlaceBeforeEffect, QuestionForgotten)
