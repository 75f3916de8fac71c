rule check_entry:
    input:
        again=W.again("check"),
        base_model=W.if_due("check", W.checked_model),  # its model card is held against the rules
    output:
        check="results/{track}/{entry}/check.json",
    log:
        "results/{track}/{entry}/logs/check.log",
    conda:
        "../envs/palio.yaml"
    resources:
        options=W.options("among"),  # a later entry does not re-run the check of an earlier one
    params:
        settings=W.settings("check"),
    shell:
        "exec palio step check results/{wildcards.track}/{wildcards.entry}"
        " --settings {params.settings:q}"
        " --options {resources.options:q}"
        " > {log:q} 2>&1"
