rule prepare_stage:
    output:
        record="resources/stages/{stage}/stage.json",
    log:
        "logs/prepare_stage/{stage}.log",
    conda:
        "../envs/palio.yaml"
    resources:
        mem_mb=8192,
        runtime=120,
    params:
        runs=lambda wildcards: W.runs(wildcards.stage),
    shell:
        "exec palio prepare-stage"
        " --runs {params.runs:q}"
        " --out {output.record:q}"
        " > {log:q} 2>&1"
