"""An engine on the GPU for a model of drawn weights, ready for rounds of prefill and decode."""

from benchmarks.engine_rounds import EngineRounds
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.executor import make_executor
from engine.executors.lookahead import LookaheadConfig
from engine.model.transformer import Transformer

# prompts of 2,048 tokens in one step, and 64 sequences of as many tokens
ENGINE = EngineConfig(max_num_seqs=64, max_batched_tokens=2048, max_model_len=2304)


def warm_rounds(model: Transformer, lookahead: LookaheadConfig | None = None) -> EngineRounds:
    """Rounds on a new engine whose kernels are compiled and whose graphs are captured.

    Raises:
        ConfigError: the GPU's memory is too small.
    """
    engine = Engine(make_executor(model, ENGINE, lookahead), ENGINE)
    engine.warm_up()
    return EngineRounds(engine, ENGINE)
