# HELM's own files lie in the entry's work/ (open) and in the closed store (closed): a rerun repeats
# unfinished HELM runs only. The closed stage waits for the open one of the same entry.
rule helm_open:
    input:
        package="results/{track}/{entry}/package.json",
        instances="resources/stages/open/stage.json",
    output:
        record="results/{track}/{entry}/open.json",
        metrics="results/{track}/{entry}/helm/open/metrics.parquet",
        instances="results/{track}/{entry}/helm/open/instances.parquet",
    log:
        "results/{track}/{entry}/logs/open.log",
    conda:
        "../envs/palio.yaml"
    threads: W.cpus
    resources:
        gpu=1,
        gpu_model=W.gpu_model,
        mem_mb=W.mem_mb,
        runtime=W.stage_minutes("open"),  # the stage's limit and a margin to load the model
    params:
        runs=W.runs("open"),
        limits=W.limits("open"),
        track=W.track_limits,
        own_server=W.own_server,
        again=W.again("open"),
    shell:
        "exec palio evaluate"
        " --entry-dir results/{wildcards.track}/{wildcards.entry}"
        " --runs {params.runs:q}"
        " --limits {params.limits:q}"
        " --track {params.track:q}"
        " --instances {input.instances:q}"
        " --threads {threads}"
        " {params.own_server:q}"
        " {params.again:q}"
        " > {log:q} 2>&1"


use rule helm_open as helm_closed with:
    input:
        package="results/{track}/{entry}/package.json",
        instances="resources/stages/closed/stage.json",
        open="results/{track}/{entry}/open.json",
    output:
        record="results/{track}/{entry}/closed.json",
        metrics="results/{track}/{entry}/helm/closed/metrics.parquet",
        instances="results/{track}/{entry}/helm/closed/instances.parquet",
    log:
        "results/{track}/{entry}/logs/closed.log",
    conda:
        "../envs/palio.yaml"
    resources:
        gpu=1,
        gpu_model=W.gpu_model,
        mem_mb=W.mem_mb,
        runtime=W.stage_minutes("closed"),
    params:
        runs=W.runs("closed"),
        limits=W.limits("closed"),
        track=W.track_limits,
        own_server=W.own_server,
        again=W.again("closed"),
