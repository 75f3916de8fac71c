rule build_package:
    input:
        check="results/{track}/{entry}/check.json",
        base_model=W.base_model_manifest,
        adapter=W.adapter_manifest,
        program=W.program_files,
    output:
        package="results/{track}/{entry}/package.json",
    log:
        "results/{track}/{entry}/logs/package.log",
    conda:
        "../envs/palio.yaml"
    threads: W.cpus
    resources:
        mem_mb=W.mem_mb,
        runtime=120,
    params:
        competition=W.competition.competition,
        handed_in=W.handed_in,
        base_model=lambda wildcards: f"resources/base_models/{W.base_model_id(wildcards)}",
    shell:
        "OMP_NUM_THREADS={threads} exec palio package"
        " --competition-id {params.competition}"
        " --entry-dir results/{wildcards.track}/{wildcards.entry}"
        " {params.handed_in:q}"
        " --base-model {params.base_model:q}"
        " > {log:q} 2>&1"
