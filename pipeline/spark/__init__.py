"""The SparkSession and everything needed to build it: Java, jars, the class archive, file systems."""
