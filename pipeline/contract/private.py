"""Private APIs of Spark's analyzer and optimizer: they tell whether a contract's rules can be trusted.

Without them, a rule that reads the clock or another row would be accepted, and lose records.
"""

import re

from pipeline.spark.private import _java, setting

from pyspark.sql import Column, DataFrame, SparkSession


def is_of_one_row(rows: DataFrame, condition: str) -> bool:
    """Whether SQL over the columns of `rows` depends on the row alone: it has no subquery, and nothing that Spark implements by
    changing the rows, such as `window(…)`, which drops rows without a time.
    """
    pattern = _java(rows.sparkSession).org.apache.spark.sql.catalyst.trees.TreePattern
    plan = rows.where(condition)._jdf.queryExecution().analyzed()
    return not plan.containsPattern(pattern.PLAN_EXPRESSION()) and plan.child().equals(
        rows._jdf.queryExecution().analyzed()
    )


def is_deterministic(rows: DataFrame, condition: str) -> bool:
    """Whether SQL over the columns of `rows` always gives the same result for the same row: it uses no random numbers and does
    not read the clock.

    Spark turns 'now', 'today' and the like into the current time when it parses a query (`DATE 'today'`) or optimizes it,
    wherever constant text is cast to a time (`t > trim('now')`). Only the optimizer's rule FinishAnalysis finds all of these.
    In two time zones, such a time differs both as an instant and as a local time; a constant differs in only one of the two.
    """
    spark = rows.sparkSession
    pattern = _java(spark).org.apache.spark.sql.catalyst.trees.TreePattern
    seen = []
    for there in ("+18:00", "-18:00"):  # it is never the same day in both
        with setting(spark, "spark.sql.session.timeZone", there):
            plan = rows.where(condition)._jdf.queryExecution().analyzed()
            finished = spark._jsparkSession.sessionState().optimizer().FinishAnalysis().apply(plan)
            on_clock = finished.condition().sql()
        # AES with a random initialization vector counts as deterministic, although it is not.
        if (
            not (plan.deterministic() and finished.deterministic())
            or plan.containsPattern(pattern.CURRENT_LIKE())
            or "ExpressionImplUtils.aesEncrypt(" in on_clock
        ):
            return False
        with setting(spark, "spark.sql.session.timeZone", "UTC"):
            texts = (on_clock, finished.condition().sql())
        seen.append([re.findall(r"\b(?:DATE|TIME\w*) '[^']*'", text) for text in texts])
        if not seen[0][0]:
            return True  # without a time, there is nothing to compare
    return not any(
        one != other and instant != other_instant for one, instant, other, other_instant in zip(*seen[0], *seen[1])
    )


def is_zone(spark: SparkSession, name: str) -> bool:
    """Whether Java has a time zone of this name."""
    return _java(spark).java.time.ZoneId.getAvailableZoneIds().contains(name)


def attempt(spark: SparkSession, condition: str) -> Column:
    """A column that is null for rows for which the SQL can't be evaluated. SQL's own `try_…` functions cover only some cases."""
    java = _java(spark).org.apache.spark.sql
    parsed = spark._jsparkSession.sessionState().sqlParser().parseExpression(condition)
    return Column(java.classic.ExpressionUtils.column(java.catalyst.expressions.TryEval(parsed)))
