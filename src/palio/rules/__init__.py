"""The competition's rules as data (config/rules/*.yaml) and pure checks: entry × rules → violations."""
