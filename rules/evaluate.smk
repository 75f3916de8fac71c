# helm_open and helm_closed. HELM's own files lie in the entry's work/ (open) and in the closed store (closed): a
# rerun repeats unfinished HELM runs only. The closed stage waits for the open one of the same entry.
for stage in ["open", "closed"]:

    rule:
        name:
            f"helm_{stage}"
        input:
            again=W.again(stage),
            package=W.if_due(stage, "results/{track}/{entry}/package.json"),
            instances=W.if_due(stage, f"resources/stages/{stage}/stage.json"),
            before=W.if_due(
                stage, *["results/{track}/{entry}/open.json"] * (stage == "closed")
            ),
        output:
            record=f"results/{{track}}/{{entry}}/{stage}.json",
            metrics=f"results/{{track}}/{{entry}}/helm/{stage}/metrics.parquet",
            instances=f"results/{{track}}/{{entry}}/helm/{stage}/instances.parquet",
        log:
            f"results/{{track}}/{{entry}}/logs/{stage}.log",
        conda:
            "../envs/palio.yaml"
        threads: W.cpus
        resources:
            gpu=1,
            gpu_model=W.gpu_model,
            mem_mb=W.mem_mb,
            runtime=W.minutes(stage),  # the stage's limit and a margin to load the model
        params:
            stage=stage,
            settings=W.settings(stage),
        shell:
            "exec palio step {params.stage} results/{wildcards.track}/{wildcards.entry}"
            " --settings {params.settings:q}"
            " --threads {threads}"
            " > {log:q} 2>&1"
