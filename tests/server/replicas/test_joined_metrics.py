"""Tests of the metrics of several replicas in one text."""

from prometheus_client.parser import text_string_to_metric_families

from server.http.metrics import Metrics
from server.replicas.joined_metrics import joined_metrics


def test_every_sample_has_its_replica():
    texts = {}
    for number, name in enumerate(("a", "b"), 1):
        metrics = Metrics("model", "memplus:")
        metrics.running.set(number)
        metrics.prompt_tokens.inc(10 * number)
        metrics.request_prompt.observe(10 * number)
        texts[name] = metrics.render().decode()
    joined = joined_metrics(texts).decode()
    families = list(text_string_to_metric_families(joined))
    assert len({family.name for family in families}) == len(families)
    samples = {
        (sample.name, sample.labels["replica"], sample.labels.get("le")): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples["memplus:num_requests_running", "a", None] == 1
    assert samples["memplus:num_requests_running", "b", None] == 2
    assert samples["memplus:prompt_tokens_total", "b", None] == 20
    assert samples["memplus:request_prompt_tokens_count", "a", None] == 1
    # nothing is lost
    alone = sum(len(f.samples) for t in texts.values() for f in text_string_to_metric_families(t))
    assert len(samples) == alone
