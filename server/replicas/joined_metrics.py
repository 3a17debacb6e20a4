"""Joins the metrics of several replicas into one text, with a label for the replica."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_LABEL = "replica"


def joined_metrics(texts: Mapping[str, str]) -> bytes:
    """The metrics of all replicas in Prometheus' text format.

    Args:
        texts: the metrics of each replica in that format, by its name.
    """
    return generate_latest(_Joined(texts))


@dataclass(frozen=True)
class _Joined(Collector):
    texts: Mapping[str, str]

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                samples = [
                    one._replace(labels={_LABEL: replica} | one.labels) for one in family.samples
                ]
                known = families.setdefault(family.name, family)
                known.samples = samples if known is family else known.samples + samples
        yield from families.values()
