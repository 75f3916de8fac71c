rule build_package:
    input:
        again=W.again("package"),
        check=W.if_due("package", "results/{track}/{entry_id}/check.json"),
        base_model=W.if_due("package", W.base_model_manifest),
        adapter=W.if_due("package", W.adapter),
        image=W.if_due("package", W.image),
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
        settings=W.settings("package"),
    shell:
        "exec palio step package results/{wildcards.track}/{wildcards.entry}"
        " --settings {params.settings:q}"
        " --threads {threads}"
        " --memory-mb {resources.mem_mb}"
        " --minutes {resources.runtime}"
        " > {log:q} 2>&1"
