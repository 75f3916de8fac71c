rule generate_demo_data:
    output:
        sources=expand("resources/demo_sources/{family}.jsonl", family=DEMO_FAMILIES),
    log:
        "logs/generate_demo_data.log",
    conda:
        "../envs/palio.yaml"
    params:
        seed=7,
    shell:
        "exec palio demo-data --out resources/demo_sources --seed {params.seed} > {log:q} 2>&1"


rule curate_dataset:
    input:
        again=W.again("curate"),
        check=W.if_due("curate", "results/{track}/{entry}/check.json"),
        base_model=W.if_due("curate", W.base_model_manifest),  # its tokenizer counts tokens
        sources=W.if_due("curate", W.source_files),
        open_stage=W.if_due("curate", W.held_against),
        shards=W.if_due("curate", W.last_shards),
    output:
        manifest="results/{track}/{entry}/dataset/manifest.json",
        dataset="results/{track}/{entry}/dataset/train.parquet",
        dropped="results/{track}/{entry}/dataset/dropped.parquet",
        card="results/{track}/{entry}/dataset/card.md",
    log:
        "results/{track}/{entry}/logs/curate.log",
    conda:
        "../envs/palio.yaml"
    threads: 2
    resources:
        options=W.options("shards"),  # how many jobs share a curation changes nothing of it
        mem_mb=8192,
        runtime=240,
    params:
        settings=W.settings("curate"),
        ahead=[],
    shell:
        "exec palio step curate results/{wildcards.track}/{wildcards.entry}"
        " --settings {params.settings:q}"
        " --options {resources.options:q}"
        " --threads {threads}"
        " --memory-mb {resources.mem_mb}"
        " --minutes {resources.runtime}"
        " {params.ahead:q}"
        " > {log:q} 2>&1"


# Several jobs share the curation of an entry that the config's `shards` names. join_shards 0 reads the sources;
# each curate_shard takes its share of the rows as far as they need no others; join_shards 1 judges what needs all;
# and so on. They only work ahead, in work/curate: curate_dataset does what is left, and decides.
use rule curate_dataset as curate_shard with:
    input:
        W.join_before,
    output:
        temp(touch("results/{track}/{entry}/work/shards/{phase}.{shard}-of-{shards}")),
    log:
        "results/{track}/{entry}/logs/curate.{phase}.{shard}-of-{shards}.log",
    params:
        settings=W.settings("curate"),
        ahead=["--shard", "{shard}-of-{shards}"],


use rule curate_dataset as join_shards with:
    input:
        check="results/{track}/{entry}/check.json",
        base_model=W.base_model_manifest,
        sources=W.source_files,
        open_stage=W.held_against,
        shards=W.shards,
    output:
        temp(touch("results/{track}/{entry}/work/shards/{phase}.joined")),
    log:
        "results/{track}/{entry}/logs/curate.{phase}.joined.log",
    params:
        settings=W.settings("curate"),
        ahead=["--join", "{phase}"],


# The organizer's side: it reads the closed stage's instances, counts alone leave it.
rule measure_contamination:
    input:
        again=W.again("contamination"),
        dataset=W.if_due(
            "contamination", "results/{track}/{entry}/dataset/manifest.json"
        ),
        stages=W.if_due(
            "contamination",
            *expand("resources/stages/{stage}/stage.json", stage=["open", "closed"]),
        ),
    output:
        contamination="results/{track}/{entry}/contamination.json",
    log:
        "results/{track}/{entry}/logs/contamination.log",
    conda:
        "../envs/palio.yaml"
    resources:
        mem_mb=8192,
        runtime=60,
    params:
        settings=W.settings("contamination"),
    shell:
        "exec palio step contamination results/{wildcards.track}/{wildcards.entry}"
        " --settings {params.settings:q}"
        " > {log:q} 2>&1"
