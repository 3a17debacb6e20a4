"""Source files without a test file of their own, and the file in tests/ that covers each."""

COVERED_BY = {
    "engine/config.py": "engine/test_engine.py",
    "engine/errors.py": "engine/test_engine.py",
    "engine/executors/batch.py": "engine/executors/test_executor.py",
    "engine/executors/cpu/executor.py": "engine/executors/cpu/test_micro_batches.py",
    "engine/executors/cpu/layers.py": "engine/executors/cpu/test_decoder.py",
    "engine/executors/cpu/memory.py": "engine/executors/cpu/test_packed_memory.py",
    "engine/executors/cpu/mixture.py": "engine/model/test_mixture.py",
    "engine/executors/cpu/packed_layers.py": "engine/executors/cpu/test_decoder.py",
    "engine/executors/cpu/packing.py": "engine/executors/cpu/test_decoder.py",
<<<<<<< HEAD
    "engine/executors/cuda/kernels/attention_kernels.py": (
        "engine/executors/cuda/interpreted/test_paged_attention.py"
    ),
    "engine/executors/cuda/kernels/attention_launch.py": (
        "engine/executors/cuda/compiled/test_attention_budgets.py"
    ),
    "engine/executors/cuda/kernels/kv_formats.py": (
        "engine/executors/cuda/interpreted/test_rotate_and_store.py"
    ),
    "engine/executors/cuda/kernels/paged_attention.py": (
        "engine/executors/cuda/interpreted/test_paged_attention.py"
    ),
    "engine/executors/cuda/kernels/paged_step.py": (
        "engine/executors/cuda/interpreted/test_paged_attention.py"
    ),
    "engine/executors/cuda/kernels/rotate_and_store.py": (
        "engine/executors/cuda/interpreted/test_rotate_and_store.py"
=======
    "engine/executors/cuda/kernels/add_biases.py": (
        "engine/executors/cuda/interpreted/test_add_biases.py"
    ),
    "engine/executors/cuda/kernels/block_table.py": (
        "engine/executors/cuda/interpreted/test_block_table.py"
    ),
    "engine/executors/cuda/kernels/choose_tokens.py": (
        "engine/executors/cuda/interpreted/test_choose_tokens.py"
>>>>>>> h-samp
    ),
    "engine/executors/eager.py": "engine/executors/test_executor.py",
    "engine/model/config.py": "engine/model/test_transformer.py",
    "engine/model/feed_forward.py": "test_new_feed_forward.py",
    "engine/model/forward_trace.py": "engine/executors/cpu/test_decoder.py",
    "engine/model/layers.py": "engine/model/test_transformer.py",
    "engine/model/layout.py": "engine/executors/cpu/test_micro_batches.py",
    "engine/model/norm.py": "engine/model/test_attention.py",
    "engine/model/rotary.py": "engine/model/test_attention.py",
    "engine/model/sequence_groups.py": "engine/model/test_attention.py",
    "engine/model/uninitialised.py": "engine/model/test_transformer.py",
    "engine/request.py": "engine/test_engine.py",
    "engine/sampling/choice.py": "engine/executors/cpu/test_sampling.py",
    "engine/sampling/log_probabilities.py": "engine/executors/cpu/test_log_probabilities.py",
    "engine/sampling/logit_rules.py": "engine/sampling/test_sampler.py",
    "engine/sampling/masks.py": "engine/test_company.py",
    "engine/sampling/params.py": "engine/sampling/test_sampler.py",
    "engine/sampling/request_rules.py": "engine/sampling/test_sampler.py",
    "engine/scheduling/chunk_results.py": "engine/scheduling/test_scheduler.py",
    "engine/scheduling/sequence.py": "engine/scheduling/test_scheduler.py",
    "engine/scheduling/step_plan.py": "engine/scheduling/test_batching.py",
    "memory_ops/backends.py": "memory_ops/test_operations.py",
    "memory_ops/checks.py": "memory_ops/test_operations.py",
    "memory_ops/native/backend.py": "memory_ops/test_row_gradients.py",
    "memory_ops/native/disk_rows.py": "memory_ops/tables/test_disk.py",
    "memory_ops/native/row_fetcher.py": "memory_ops/tables/test_disk.py",
    "memory_ops/tables/disk_lookup.py": "memory_ops/tables/test_disk.py",
    "memory_ops/tables/row_cache.py": "memory_ops/interpreted/test_row_cache.py",
    "memory_ops/tables/streams.py": "memory_ops/interpreted/test_host_table.py",
    "memory_ops/tables/table_statistics.py": "engine/test_table_counts.py",
    "memory_ops/tables/value_table.py": "memory_ops/tables/test_device.py",
    "memory_ops/triton_kernels/fetch_rows.py": "memory_ops/interpreted/test_host_table.py",
    "memory_ops/triton_kernels/gather_rows.py": "memory_ops/interpreted/test_gather_rows.py",
    "memory_ops/triton_kernels/int4_rows.py": "memory_ops/interpreted/test_gather_rows.py",
    "memory_ops/triton_kernels/launch.py": "memory_ops/compiled/test_budgets.py",
    "memory_ops/triton_kernels/place_rows.py": "memory_ops/interpreted/test_row_cache.py",
    "memory_ops/triton_kernels/product_topk.py": "memory_ops/interpreted/test_product_topk.py",
    "memory_ops/triton_kernels/row_dots.py": "memory_ops/interpreted/test_row_dots.py",
    "memory_ops/triton_kernels/row_gradients.py": "memory_ops/interpreted/test_row_gradients.py",
    "memory_ops/triton_kernels/sort_rows.py": "memory_ops/interpreted/test_row_cache.py",
    "memory_ops/triton_kernels/table_view.py": "memory_ops/interpreted/test_gather_rows.py",
    "server/cli/evaluate.py": "weights/training/test_evaluate.py",
    "server/cli/generate.py": "server/cli/test_options.py",
    "server/cli/main.py": "server/cli/test_options.py",
    "server/cli/train.py": "weights/training/test_trainer.py",
    "server/config.py": "server/http/test_app.py",
    "server/engine_entry.py": "server/test_served_lookahead.py",
    "server/http/activity_log.py": "server/http/test_table_metrics.py",
    "server/http/admission.py": "server/http/test_app.py",
    "server/http/body_limit.py": "server/http/test_app.py",
    "server/http/choice.py": "server/http/test_completions.py",
    "server/http/errors.py": "server/http/test_app.py",
    "server/http/logprobs.py": "server/http/test_completion_options.py",
    "server/http/metrics.py": "server/http/test_app.py",
    "server/http/schemas.py": "server/http/test_completions.py",
    "server/http/service.py": "server/http/test_app.py",
    "server/http/table_gains.py": "server/http/test_table_metrics.py",
    "server/http/text_stream.py": "server/http/test_completions.py",
    "weights/cgroups.py": "weights/test_available_memory.py",
    "weights/checkpoints/convert.py": "weights/checkpoints/test_disk_tier.py",
    "weights/checkpoints/detokenizer.py": "weights/checkpoints/test_tokenizer.py",
    "weights/checkpoints/dtype_names.py": "weights/checkpoints/test_table_loading.py",
    "weights/checkpoints/feed_forward_json.py": "weights/checkpoints/test_config_json.py",
    "weights/checkpoints/importers/gguf_tokenizer.py": "weights/checkpoints/importers/test_gguf.py",
    "weights/checkpoints/host_tables.py": "memory_ops/interpreted/test_host_loading.py",
    "weights/checkpoints/json_fields.py": "weights/checkpoints/test_config_json.py",
    "weights/checkpoints/memory_request.py": "weights/checkpoints/test_table_tier.py",
    "weights/checkpoints/summary.py": "weights/checkpoints/test_checkpoint.py",
    "weights/checkpoints/table_files.py": "weights/checkpoints/test_table_loading.py",
    "weights/checkpoints/tensor_files.py": "weights/checkpoints/test_checkpoint.py",
    "weights/checkpoints/tensor_writer.py": "weights/checkpoints/test_checkpoint.py",
    "weights/errors.py": "weights/training/test_corpus.py",
    "weights/models/named_models.py": "test_wordnet.py",
    "weights/models/prepare.py": "test_wordnet.py",
    "weights/training/initialise.py": "weights/training/test_trainer.py",
    "weights/training/loss.py": "engine/model/test_mixture.py",
    "weights/training/new_model.py": "weights/training/test_trainer.py",
    "weights/training/replicas.py": "weights/training/test_trainer.py",
    "weights/training/report.py": "weights/training/test_trainer.py",
    "weights/training/run_log.py": "weights/training/test_trainer.py",
    "weights/training/run_record.py": "weights/training/test_trainer.py",
    "weights/training/table_usage.py": "weights/training/test_trainer.py",
    "weights/training/token_file.py": "weights/training/test_token_stream.py",
    "weights/training/train_state.py": "weights/training/test_trainer.py",
    "weights/training/training_data.py": "weights/training/test_trainer.py",
}
