rule check_entry:
    input:
        base_model=W.checked_model,  # its model card is held against the rules
    output:
        check="results/{track}/{entry}/check.json",
    log:
        "results/{track}/{entry}/logs/check.log",
    conda:
        "../envs/palio.yaml"
    resources:
        among=W.among(),  # no param: a later entry does not re-run the check of an earlier one
    params:
        file=W.entry_file,
        against=W.against(),
        # re-runs the check when what the rules look at changes, not when a learning rate does
        identity=W.identity,
    shell:
        "exec palio check {params.file:q}"
        " --against {params.against:q}"
        " --among {resources.among:q}"
        " --entry-dir results/{wildcards.track}/{wildcards.entry}"
        " > {log:q} 2>&1"
