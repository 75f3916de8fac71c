"""The competition's rules as data (config/rulesets/*.yaml) and pure checks: entry × rules → violations."""
