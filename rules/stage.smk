rule prepare_stage:
    input:
        again=W.stage_again,
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
        runs=W.runs,
    shell:
        "exec palio step prepare-stage {output.record:q}"
        " --runs {params.runs:q}"
        " > {log:q} 2>&1"
