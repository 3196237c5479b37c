"""What a recipe file may say beyond its keys: another file that it extends, variables, an assistant by rule.

Works on plain values and their places (`yaml_source`); knows no type of a recipe.
"""
