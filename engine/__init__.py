"""Token ids in, token ids out: model, KV blocks, scheduler, sampler, runner. No text, no HTTP."""
