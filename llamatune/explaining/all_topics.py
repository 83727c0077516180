"""Every topic, and those that an error's text belongs to."""

from __future__ import annotations

from llamatune.explaining.checkpoint_topics import CHECKPOINT_TOPICS
from llamatune.explaining.judge_topics import JUDGE_TOPICS
from llamatune.explaining.machine_topics import MACHINE_TOPICS
from llamatune.explaining.row_topics import ROW_TOPICS
from llamatune.explaining.spec_topics import SPEC_TOPICS
from llamatune.explaining.topics import Topic

TOPICS = (*MACHINE_TOPICS, *SPEC_TOPICS, *ROW_TOPICS, *CHECKPOINT_TOPICS, *JUDGE_TOPICS)


def topics_of(text: str) -> list[Topic]:
    """The topics of an error's text, or of words of one, the best first: that whose words match most of it."""

    def matched(topic: Topic) -> int:
        return sum(len(match[0]) for match in topic.pattern.finditer(text))

    return sorted(filter(matched, TOPICS), key=matched, reverse=True)
