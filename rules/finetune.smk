# Checkpoints, ledger and finished adapters live in work/, named by content: Snakemake may delete the
# outputs before a rerun, the trainer finds its work again. A command entry's own program trains in the same
# budget, confined.
rule finetune:
    input:
        again=W.again("finetune"),
        check=W.if_due("finetune", "results/{track}/{entry_id}/check.json"),
        base_model=W.if_due("finetune", W.base_model_manifest),
        image=W.if_due("finetune", W.image),  # one that cannot be built costs no GPU time
        dataset=W.if_due("finetune", "results/{track}/{entry_id}/dataset/manifest.json"),
        rows=W.if_due("finetune", "results/{track}/{entry_id}/dataset/train.parquet"),
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
        options=W.options("telemetry"),
        gpu_model=W.gpu_model,
        mem_mb=W.mem_mb,
        runtime=W.minutes("finetune"),  # the track's budget is the trainer's; the margin is for loading and saving
    params:
        settings=W.settings("finetune"),
    shell:
        "exec palio step finetune results/{wildcards.track}/{wildcards.entry}"
        " --settings {params.settings:q}"
        " --options {resources.options:q}"
        " --threads {threads}"
        " > {log:q} 2>&1"
