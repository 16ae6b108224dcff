"""Every claim of this project that a benchmark measures, in the order of the documentation."""

from benchmarks import (
    component_directions,
    decode_step,
    direction_method_cost,
    dominance_stop,
    evaluation_pool,
    export_memory,
    fold_count,
    quantized_scores,
    residual_pages,
    residual_statistics,
    search_overhead,
    shared_weights_memory,
    weight_cache,
)
from benchmarks.direction_search import claim as direction_search
from benchmarks.fault_recovery import claim as fault_recovery
from benchmarks.search_scaling import budget_efficiency, sampler_time, throughput
from benchmarks.streaming_evaluation import claim as streaming_evaluation
from benchmarks.versus_heretic import trial_speed, whole_study

CLAIMS = (
    trial_speed.CLAIM,
    whole_study.CLAIM,
    decode_step.CLAIM,
    weight_cache.CLAIM,
    shared_weights_memory.CLAIM,
    quantized_scores.CLAIM,
    export_memory.CLAIM,
    search_overhead.CLAIM,
    throughput.CLAIM,
    sampler_time.CLAIM,
    budget_efficiency.CLAIM,
    dominance_stop.CLAIM,
    fault_recovery.CLAIM,
    fold_count.CLAIM,
    component_directions.CLAIM,
    residual_statistics.CLAIM,
    direction_method_cost.CLAIM,
    direction_search.CLAIM,
    residual_pages.CLAIM,
    evaluation_pool.CLAIM,
    streaming_evaluation.CLAIM,
)
