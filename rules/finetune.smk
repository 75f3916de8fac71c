# Checkpoints, ledger and finished adapters live in work/, named by content: Snakemake may delete the
# outputs before a rerun, the trainer finds its work again. A command entry's own program trains in the same
# budget, confined.
rule finetune:
    input:
        check="results/{track}/{entry}/check.json",
        base_model=W.base_model_manifest,
        dataset="results/{track}/{entry}/dataset/manifest.json",
        rows=ancient("results/{track}/{entry}/dataset/train.parquet"),
        program=W.program_files,
    output:
        adapter="results/{track}/{entry}/adapter.json",
        telemetry="results/{track}/{entry}/train.parquet",
    log:
        "results/{track}/{entry}/logs/finetune.log",
    conda:
        "../envs/palio.yaml"
    threads: W.cpus
    resources:
        gpu=1,
        telemetry=W.telemetry,  # no param: where training is told and what it costs re-runs nothing
        gpu_model=W.gpu_model,
        mem_mb=W.mem_mb,
        runtime=W.finetune_minutes,  # the track's budget is the trainer's; the margin is for loading and saving
    params:
        competition=W.competition.competition,
        training=W.training,
        again=W.again("finetune"),
        track=W.track_limits,
        base_model=lambda wildcards: f"resources/base_models/{W.base_model_id(wildcards)}",
    shell:
        "exec palio finetune"
        " --competition-id {params.competition}"
        " --entry-dir results/{wildcards.track}/{wildcards.entry}"
        " {params.training:q}"
        " {params.again:q}"
        " --track {params.track:q}"
        " --base-model {params.base_model:q}"
        " --threads {threads}"
        " --telemetry {resources.telemetry:q}"
        " > {log:q} 2>&1"
