# A team's Dockerfile becomes an image, confined, with the network only if the rule set says so. Its work is in
# work/builds, named by the content of the folder: the same folder is built once.
rule build_image:
    input:
        again=W.again("image"),
        check=W.if_due("image", "results/{track}/{entry}/check.json"),
    output:
        image="results/{track}/{entry}/image.json",
    log:
        "results/{track}/{entry}/logs/image.log",
    conda:
        "../envs/palio.yaml"
    threads: 2
    resources:
        mem_mb=W.build_mem_mb,
        runtime=W.build_minutes,
    params:
        settings=W.settings("image"),
    shell:
        "exec palio step image results/{wildcards.track}/{wildcards.entry}"
        " --settings {params.settings:q}"
        " --threads {threads}"
        " > {log:q} 2>&1"
