rule fetch_base_model:
    output:
        manifest="resources/base_models/{base_model}/manifest.json",
    log:
        "logs/fetch_base_model/{base_model}.log",
    retries: 2  # a download; what has arrived is kept
    conda:
        "../envs/palio.yaml"
    resources:
        mem_mb=8192,
        runtime=240,
    params:
        source=W.base_model,
        approved_as=W.approved_as,
        code=W.approved_code,
    shell:
        "exec palio step fetch-base-model resources/base_models/{wildcards.base_model:q}"
        " --source {params.source:q}"
        " --approved-as={params.approved_as:q}"
        " --code {params.code:q}"
        " > {log:q} 2>&1"
